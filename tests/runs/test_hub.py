"""Models, data sets and adapters of the Hub, by its real clients from a local server."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_client import DRIVER, Result, parquet, run, written
from hub_server import Hub

from zo_peft.tools.demo import EMBEDDED, LABEL_WORDS, TEMPLATE

# The clients wait 23 seconds for a server that is down, for each file.
IMPATIENT = "import time; time.sleep = lambda seconds: None\n"

LOCAL: dict[str, Any] = {
    "dataset_name": None,
    "dataset_test_split": None,
    "train_file": EMBEDDED / "train.jsonl",
    "eval_file": EMBEDDED / "test.jsonl",
}
#: For `evaluate`, which takes no data to train on.
LOCAL_MODEL = {**LOCAL, "train_file": None, "model_name_or_path": EMBEDDED / "model"}


def command(name: str, **changes: Any) -> list[str]:
    """A command line on the Hub's model and data; None removes an option."""
    chosen = {
        "model_name_or_path": "zo/tiny",
        "dataset_name": "zo/reviews",
        "dataset_test_split": "test",
        "prompt_template": TEMPLATE,
        "label_words": LABEL_WORDS,
        "per_device_eval_batch_size": 100,
        "use_cpu": True,
        "disable_tqdm": True,
        "json": True,
        **changes,
    }
    given = {option: value for option, value in chosen.items() if value is not None}
    return [name, *(part for option in given for part in (f"--{option}", str(given[option])))]


def train(**changes: Any) -> list[str]:
    settings = {
        "dataset_train_split": "train",
        "max_forward_passes": 16,
        "zo_eps": 1e-2,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "output_dir": "out",
    }
    modules = ["--lora_target_modules", "q_proj", "v_proj"]
    return [*command("train", **{**settings, **changes}), *modules]


def mistaken(**changes: Any) -> list[str]:
    """In a folder of its own, because one that holds a run is refused."""
    return train(**{"output_dir": "mistaken", **changes})


#: What an adapter's run tells.
TOLD = dict.fromkeys(("model_name_or_path", "prompt_template", "label_words"))


def evaluate(**changes: Any) -> list[str]:
    return command("evaluate", **changes)


def sst2(**changes: Any) -> list[str]:
    own = dict.fromkeys(("dataset_name", "dataset_test_split", "prompt_template", "label_words"))
    return evaluate(task="sst2", **{**own, **changes})


def glue(sst2_rows: dict[str, list[dict[str, Any]]]) -> dict[str, bytes]:
    """Laid out as nyu-mll/glue: a folder of Parquet files for each configuration."""
    tables = {"cola": {split: [{"words": "a"}] for split in sst2_rows}, "sst2": sst2_rows}
    configs, files = [], {}
    for config, splits in tables.items():
        found = [{"split": split, "path": f"{config}/{split}-*"} for split in splits]
        configs.append({"config_name": config, "data_files": found})
        for split, rows in splits.items():
            files[f"{config}/{split}-00000-of-00001.parquet"] = parquet(rows)
    return files | {"README.md": f"---\n{yaml.safe_dump({'configs': configs})}---\n".encode()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where commands run: `out` gets the adapter, `glue` is a local copy of sst2."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def hub(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    lines = {
        split: (EMBEDDED / f"{split}.jsonl").read_bytes().splitlines(keepends=True)[:60]
        for split in ("train", "test")
    }
    rows = {
        split: [{"sentence": row["text"], "label": row["label"]} for row in map(json.loads, found)]
        for split, found in lines.items()
    }
    written(folder, {"glue/dev.jsonl": "\n".join(map(json.dumps, rows["test"])).encode()})

    model = {path.name: path.read_bytes() for path in (EMBEDDED / "model").iterdir()}
    del model["model.safetensors"]
    adapter = {"adapter_config.json": b'{"peft_type": "LORA", "task_type": "CAUSAL_LM"}'}
    reviews = {f"{split}.jsonl": b"".join(found) for split, found in lines.items()}
    models = {
        "zo/pickled": {**model, "pytorch_model.bin": b"a pickle"},
        "zo/pickled-adapter": {**adapter, "adapter_model.bin": b"a pickle"},
    }
    data = {
        "zo/reviews": reviews,
        "zo/broken": {**reviews, "train.jsonl": b'{"text": "a", "label": 1}\n{"text":\n'},
        "nyu-mll/glue": glue({"train": rows["train"], "validation": rows["test"]}),
    }
    here = {"zo/tiny": EMBEDDED / "model", "zo/adapter": folder / "out"}
    with Hub(
        {**here, **{name: written(root / name, files) for name, files in models.items()}},
        {name: written(root / name, files) for name, files in data.items()},
    ) as server:
        yield server


#: By name: a mistake, and what its message has to say.
MISTAKES: dict[str, tuple[list[str], str]] = {
    "missing model": (
        mistaken(**LOCAL, model_name_or_path="zo/none"),
        r"'zo/none' .*no such folder, and none such on the Hub.* Give a folder .* or a model id",
    ),
    "missing revision": (
        mistaken(**LOCAL, model_revision="v9"),
        r"'zo/tiny' .*no such revision.* Give a folder",
    ),
    "model in a pickle": (
        mistaken(**LOCAL, model_name_or_path="zo/pickled"),
        r"model 'zo/pickled' .*model\.safetensors or model\.safetensors\.index\.json\. Give",
    ),
    "missing data set": (
        mistaken(dataset_name="zo/none"),
        r"data set 'zo/none', split 'train' .*doesn't exist on the Hub.* Give .*--train_file",
    ),
    "missing split": (
        mistaken(dataset_test_split="dev"),
        r"data set 'zo/reviews', split 'dev' .*Should be one of \['train', 'test'\]\. Give",
    ),
    "missing configuration": (
        mistaken(dataset_config="large"),
        r"data set 'zo/reviews'.* 'large' not found. Available: \['default'\]\. Give",
    ),
    "broken data set": (
        mistaken(dataset_name="zo/broken"),
        r"data set 'zo/broken', split 'train' .*JSON parse error: .*row 1\. Give",
    ),
    "missing adapter": (
        evaluate(**LOCAL_MODEL, adapter_name_or_path="zo/none"),
        r"adapter 'zo/none' .*none such on the Hub.* Give an adapter .*adapter_model\.safetensors",
    ),
    "adapter in a pickle": (
        evaluate(**LOCAL_MODEL, adapter_name_or_path="zo/pickled-adapter"),
        r"adapter 'zo/pickled-adapter' .*it holds no adapter_model\.safetensors\. Give",
    ),
}

WORKING = {
    "train": train(),
    "sst2": sst2(),
    # Base, template and label words are read of the run.
    "evaluate": evaluate(adapter_name_or_path="zo/adapter", **TOLD),
}

#: What has to be fetched, and the beginning of the message where it cannot be.
FETCHED: dict[str, tuple[list[str], str]] = {
    "model": (train(**LOCAL), "the tokenizer of 'zo/tiny'"),
    "data set": (train(), "data set 'zo/reviews', split 'train'"),
    "task": (sst2(), "data set 'nyu-mll/glue', split 'validation'"),
    "adapter": (
        evaluate(**LOCAL_MODEL, adapter_name_or_path="zo/adapter"),
        "adapter 'zo/adapter'",
    ),
}


def commands_of(cases: dict[str, tuple[list[str], str]]) -> dict[str, list[str]]:
    return {name: argv for name, (argv, _) in cases.items()}


@pytest.fixture(scope="module")
def online(hub: Hub, folder: Path) -> dict[str, Result]:
    local = {"sst2 from a folder": sst2(task_data_dir="glue")}
    return run({**WORKING, **local, **commands_of(MISTAKES)}, folder, hub.url)


@pytest.fixture(scope="module")
def offline(
    hub: Hub, folder: Path, online: dict[str, Result], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Result]:
    """With an empty cache, and then with the one that `online` filled."""
    other = tmp_path_factory.mktemp("offline")
    filled = ["copy", str(folder / "hf"), str(other / "hf")]
    asked = len(hub.requests)
    commands = {**commands_of(FETCHED), "copy": filled, **WORKING}
    results = run(commands, other, hub.url, HF_HUB_OFFLINE="1")
    assert hub.requests[asked:] == []
    return results


def test_a_model_and_a_data_set_are_fetched_and_an_adapter_for_them_is_written(
    hub: Hub, folder: Path, online: dict[str, Result]
) -> None:
    printed = online["train"].printed
    assert (printed["steps"], printed["forward_passes"]) == (4, 16)
    assert printed["eval_loss_after"] != printed["eval_loss_before"]
    assert hub.downloads("zo/tiny") == {path.name for path in (EMBEDDED / "model").iterdir()}
    assert hub.downloads("zo/reviews") == {"train.jsonl", "test.jsonl"}
    config = json.loads((folder / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "zo/tiny"
    card = (folder / "out" / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "zo/tiny"
    commit = hub.repositories["models"]["zo/tiny"].commit
    assert f'from_pretrained("zo/tiny", revision="{commit}")' in card


def test_a_benchmark_task_from_the_hub_is_as_from_a_folder(
    hub: Hub, online: dict[str, Result]
) -> None:
    printed = online["sst2"].printed
    assert printed["examples"] == 60
    assert printed == online["sst2 from a folder"].printed
    assert "sst2/validation-00000-of-00001.parquet" in hub.downloads("nyu-mll/glue")
    assert not any(path.startswith("cola/") for path in hub.downloads("nyu-mll/glue"))


def test_an_adapter_from_the_hub_is_evaluated_as_when_it_was_trained(
    hub: Hub, online: dict[str, Result]
) -> None:
    trained, evaluated = online["train"].printed, online["evaluate"].printed
    assert evaluated["metric"] == trained["metric_after"]
    assert evaluated["eval_loss"] == pytest.approx(trained["eval_loss_after"], rel=1e-6)
    weights = {"adapter_config.json", "adapter_model.safetensors"}
    assert hub.downloads("zo/adapter") == weights | {"zo_metrics.json"}


def test_no_pickle_is_asked_for(hub: Hub, online: dict[str, Result]) -> None:
    assert online["adapter in a pickle"].refusal
    fetched = [asked for asked in hub.requests if asked.startswith("GET ")]
    assert any(asked.endswith(".safetensors") for asked in fetched)
    assert [asked for asked in hub.requests if asked.endswith((".bin", ".pt", ".pth"))] == []


@pytest.mark.parametrize("name", MISTAKES)
def test_what_the_hub_lacks_is_refused_in_one_line(name: str, online: dict[str, Result]) -> None:
    assert re.search(MISTAKES[name][1], online[name].refusal)


@pytest.mark.parametrize("name", FETCHED)
def test_offline_with_an_empty_cache_is_refused_in_one_line(
    name: str, offline: dict[str, Result]
) -> None:
    why = "offline mode is on, and the cache does not hold it. Unset HF_HUB_OFFLINE. Give "
    assert f" error: {FETCHED[name][1]} cannot be loaded: {why}" in offline[name].refusal


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("train", ["eval_loss_before", "eval_loss_after"]),
        ("sst2", ["eval_loss", "examples"]),
        ("evaluate", ["eval_loss", "metric"]),
    ],
)
def test_offline_the_cache_serves_what_was_fetched(
    name: str, keys: list[str], online: dict[str, Result], offline: dict[str, Result]
) -> None:
    fetched, cached = online[name].printed, offline[name].printed
    assert [cached[key] for key in keys] == [fetched[key] for key in keys]


def test_a_server_that_is_down_is_named_in_one_line(tmp_path: Path) -> None:
    with Hub() as stopped:
        url = stopped.url
    results = run(commands_of(FETCHED), tmp_path, url, driver=IMPATIENT + DRIVER)
    why = f"{url} cannot be reached, and the cache does not hold it. Give "
    for name, (_, what) in FETCHED.items():
        assert f" error: {what} cannot be loaded: {why}" in results[name].refusal
    assert not (tmp_path / "out").exists()
