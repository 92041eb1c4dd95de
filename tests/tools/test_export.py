"""What goes to the Hub, by its real client to a local server; cards, merged models, other homes."""

import json
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub_client import DRIVER, Result, environment, run
from hub_server import Hub, metadata_errors
from huggingface_hub import ModelCard, constants
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save, save_file
from tiny import command_line
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from zo_peft import ZOConfig
from zo_peft.cli import main
from zo_peft.errors import UserError
from zo_peft.models.loading import quantization_config
from zo_peft.runs.arguments import DataArguments, ModelArguments
from zo_peft.runs.run import settings
from zo_peft.tools.demo import EMBEDDED, LABEL_WORDS
from zo_peft.tools.push import PushArguments, push
from zo_peft.train.card import for_repository, write_model_card
from zo_peft.train.upload import public_files

TOKEN = "hf_" + "thisisnotatoken" * 2
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
PUBLIC = {*ADAPTER, "README.md", "tokenizer.json", "tokenizer_config.json", "zo_metrics.json"}


def options(folder: Path, **changes: Any) -> list[str]:
    short = {"max_forward_passes": 16, "save_strategy": "no"}
    return command_line(folder, **{**short, **changes})


# ---- The round trip ------------------------------------------------------------------------------

#: Predictions with the lines of a card alone, in a process that never saw the training.
PLAIN = """\
import contextlib, json, re, sys
import torch
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

repository, texts, label_words = json.load(sys.stdin)
with contextlib.redirect_stdout(sys.stderr):
    exec(re.search("```python\\n(.*?)```", ModelCard.load(repository).text, re.DOTALL)[1])
tokenizer = AutoTokenizer.from_pretrained(repository)
assert "zo_peft" not in sys.modules
words = [tokenizer(" " + word, add_special_tokens=False).input_ids for word in label_words]
assert [len(ids) for ids in words] == [1, 1]
with torch.no_grad():
    inputs = [tokenizer(text + " It was", return_tensors="pt") for text in texts]
    logits = torch.stack([model.eval()(**found).logits[0, -1] for found in inputs])
predicted = logits[:, [ids[0] for ids in words]].argmax(-1)
print(json.dumps({"predicted": predicted.tolist(), "logits": logits[:5].tolist()}))
"""

#: Training that pushes as it goes on.
PUSHING = """\
import contextlib, json, sys
from peft import LoraConfig
from zo_peft import ZOConfig, ZOTrainer
from zo_peft.tools.demo import EMBEDDED

rows = [json.loads(line) for line in (EMBEDDED / "train.jsonl").open()][:40]
data = [{"prompt": r["text"] + " It was", "options": ["terrible", "great"], "label": r["label"]}
        for r in rows]
args = ZOConfig("during", strategy="gv", max_steps=4, zo_eps=1e-2, use_cpu=True,
                per_device_train_batch_size=4,
                save_strategy="steps", save_steps=2, push_to_hub=True, hub_always_push=True,
                hub_strategy="every_save", disable_tqdm=True, report_to="none")
lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
trainer = ZOTrainer("zo/tiny", args, train_dataset=data, eval_dataset=data, peft_config=lora)
with contextlib.redirect_stdout(sys.stderr):
    trainer.train()
    trainer.evaluate()
    trainer.push_to_hub(commit_message="The end", revision="v1")
"""

#: Then the commands, before each of which its last argument is executed.
SETTING = DRIVER.replace(
    "from zo_peft.cli import main\n",
    "from huggingface_hub import constants; from os import environ; import zo_peft.cli\n"
    "def main(argv):\n    exec(argv.pop())\n    return zo_peft.cli.main(argv)\n",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    models = {"zo/tiny": EMBEDDED / "model"}
    with Hub(models, root=tmp_path_factory.mktemp("hub"), users={TOKEN: "alice"}) as server:
        yield server


@pytest.fixture(scope="module")
def pushed(hub: Hub, folder: Path) -> dict[str, Result]:
    """Each command by name; `out` is the run."""
    (folder / "empty").mkdir()
    with Hub() as stopped:
        url = stopped.url
    commands = {
        "train": ["train", *options(Path("out"), model_name_or_path="zo/tiny"), "--json"],
        "dry run": ["push", "out", "alice/dry", "--dry_run", "--json"],
        "push": ["push", "out", "alice/tuned", "--commit_message", "Better", "--json"],
        "again": ["push", "out", "alice/tuned", "--json"],
        "private": ["push", "out", "secret", "--private", "--json"],
        "branch": ["push", "out", "alice/tuned", "--revision", "v/1", "--json"],
        "text": ["push", "out", "alice/tuned", "--revision", "v/1"],
        "not mine": ["push", "out", "bob/tuned"],
        "public already": ["push", "out", "alice/tuned", "--private"],
        "no name": ["push", "out", "a name"],
        "no adapter": ["push", "empty", "alice/empty"],
        "no folder": ["push", "nowhere", "alice/empty"],
    }
    # Settings that the client reads whenever it is called.
    changes = {
        "wrong token": f"environ['HF_TOKEN'] = {TOKEN + 'x'!r}",
        "no token": "environ['HF_TOKEN'] = ''",
        "down": f"constants.ENDPOINT = {url!r}",
        "offline": "constants.HF_HUB_OFFLINE = True",
    }
    named = {name: [*argv, "None"] for name, argv in commands.items()}
    named |= {name: ["push", "out", "alice/tuned", change] for name, change in changes.items()}
    return run(named, folder, hub.url, driver=PUSHING + SETTING, HF_TOKEN=TOKEN)


def files_of(hub: Hub, name: str, branch: str | None = None) -> dict[str, bytes]:
    repository = hub.repositories["models"][name]
    return (repository.branches[branch] if branch else repository).files()


def test_what_was_pushed_loads_with_plain_peft_and_predicts_the_same(
    hub: Hub, folder: Path, pushed: dict[str, Result]
) -> None:
    assert pushed["push"].printed["url"].startswith(f"{hub.url}/alice/tuned/commit/")
    rows = [json.loads(line) for line in (EMBEDDED / "test.jsonl").open()]
    process = subprocess.run(
        [sys.executable, "-c", PLAIN],
        input=json.dumps(["alice/tuned", [row["text"] for row in rows], LABEL_WORDS.split(",")]),
        capture_output=True,
        text=True,
        cwd=folder / "empty",
        env=environment(folder / "empty", hub.url),
    )
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout)
    right = [guess == row["label"] for guess, row in zip(found["predicted"], rows)]
    assert sum(right) / len(rows) == pushed["train"].printed["metric_after"]
    assert hub.downloads("alice/tuned") >= ADAPTER

    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(EMBEDDED / "model"), str(folder / "out")
    )
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "model")
    with torch.no_grad():
        inputs = [tokenizer(row["text"] + " It was", return_tensors="pt") for row in rows[:5]]
        expected = [model.eval()(**given).logits[0, -1] for given in inputs]
    assert torch.equal(torch.tensor(found["logits"]), torch.stack(expected))


def test_only_files_of_the_allow_list_go_up_and_the_card_names_the_repository(
    hub: Hub, folder: Path, pushed: dict[str, Result]
) -> None:
    local = {path.name for path in (folder / "out").iterdir()}
    assert {"zo_journal", "zo_initial.safetensors", "trainer_state.json"} <= local
    uploaded = files_of(hub, "alice/tuned")
    assert uploaded.keys() == PUBLIC
    card = uploaded.pop("README.md").decode()
    assert 'PeftModel.from_pretrained(base, "alice/tuned")' in card
    assert {name: (folder / "out" / name).read_bytes() for name in uploaded} == uploaded
    commit = hub.repositories["models"]["zo/tiny"].commit
    assert f'from_pretrained("zo/tiny", revision="{commit}")' in card
    assert ("alice/tuned", "main", "Better", sorted(PUBLIC)) in hub.commits


def test_a_dry_run_shows_names_and_sizes_and_sends_nothing(
    hub: Hub, pushed: dict[str, Result]
) -> None:
    shown = pushed["dry run"].printed
    assert shown["url"] is None
    assert "alice/dry" not in hub.repositories["models"]
    assert not any("alice/dry" in asked for asked in hub.requests)
    sizes = {file["name"]: file["size"] for file in shown["files"]}
    sent = {name: len(content) for name, content in files_of(hub, "alice/tuned").items()}
    # The card names its repository twice: for the adapter and for the tokenizer.
    longer = 2 * (len("tuned") - len("dry"))
    assert {**sizes, "README.md": sizes["README.md"] + longer} == sent
    assert shown["bytes"] == sum(sizes.values())


def test_private_repositories_and_branches(hub: Hub, pushed: dict[str, Result]) -> None:
    assert pushed["private"].printed["repo_id"] == "alice/secret"
    assert hub.repositories["models"]["alice/secret"].private
    assert not hub.repositories["models"]["alice/tuned"].private
    assert b'from_pretrained(base, "alice/secret")' in files_of(hub, "alice/secret")["README.md"]
    assert pushed["branch"].printed["revision"] == "v/1"
    assert files_of(hub, "alice/tuned", "v/1").keys() == PUBLIC
    assert f"now in alice/tuned, v/1: {hub.url}" in pushed["text"].out
    assert pushed["again"].printed["url"].startswith(hub.url)


REFUSED = {
    "not mine": r"bob/tuned cannot be pushed: this token may not write there; give a name of your",
    "public already": r"alice/tuned is there already and is public; make it private in its settin",
    "no name": r"a name cannot be pushed: .*[Rr]epo",
    "no adapter": r"empty holds no adapter \(adapter_config\.json and .*give the output folder",
    "no folder": r"nowhere holds no adapter",
    "wrong token": r"the Hub does not know the token, or there is none; `hf auth login`, or set HF",
    "no token": r"the Hub does not know the token, or there is none; `hf auth login`, or set HF_TO",
    "down": r"http://127\.0\.0\.1:\d+ cannot be reached; check the network and HF_ENDPOINT",
    "offline": r"offline mode is on; unset HF_HUB_OFFLINE",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_pushed_is_refused_in_one_line(
    name: str, hub: Hub, pushed: dict[str, Result]
) -> None:
    assert re.search(REFUSED[name], pushed[name].refusal)
    assert TOKEN not in pushed[name].err
    made = {"zo/tiny", "alice/during", "alice/tuned", "alice/secret"}
    assert hub.repositories["models"].keys() == made


def test_a_trainer_pushes_the_same_files_at_every_save(hub: Hub, pushed: dict[str, Result]) -> None:
    commits = [commit[1:3] for commit in hub.commits if commit[0] == "alice/during"]
    progress = [("main", f"Training in progress, step {step}") for step in (2, 4)]
    assert commits == [*progress, ("v1", "The end")]
    names = {name for commit in hub.commits if commit[0] == "alice/during" for name in commit[3]}
    assert names == PUBLIC
    end = files_of(hub, "alice/during", "v1")
    metrics = json.loads(end["zo_metrics.json"])
    assert (metrics["steps"], metrics["forward_passes"]) == (4, 16)
    assert 0 <= metrics["metric_after"] <= 1
    assert metrics["wall_seconds"] > 0
    assert metrics["peak_memory_bytes"] > 2**20
    assert metadata_errors(end["README.md"].decode()) == []
    assert "| steps | 4 |" in end["README.md"].decode()


# ---- Cards ---------------------------------------------------------------------------------------

USER, HOST = "zaphodb", "heart-of-gold"

#: Runs by what is special about them; paths are in the home of `USER`.
RUNS: dict[str, dict[str, Any]] = {
    "lora": {"prompt_template": "{text}\\nIt was ``` | \\n", "seed": 0},
    "lora int8": {"load_in_8bit": True, "per_example_noise": False},
    "lora nf4": {"load_in_4bit": True, "tunable": "lora_B", "dtype": "bfloat16"},
    "prefix": {"peft_type": "PREFIX_TUNING", "lora_target_modules": None},
    "prompt": {"peft_type": "PROMPT_TUNING", "lora_target_modules": None},
    "ia3": {"peft_type": "IA3", "lora_target_modules": None},
    "vera": {"peft_type": "VERA"},
    "classes": {"task_type": "SEQ_CLS", "prompt_template": None, "label_words": None},
    "scales int8": {"tune": "scales", "load_in_8bit": True, "lora_target_modules": None},
    "scales nf4": {"tune": "scales", "load_in_4bit": True, "lora_target_modules": None},
    "weights": {"tune": "weights", "lora_target_modules": None},
    "mezo": {"preset": "mezo"},
    "paper-gv": {"preset": "paper-gv", "num_candidates": 4},
    "greedy": {"strategy": "greedy", "weight_decay": 0.1},
    "lozo": {"low_rank_noise": "lozo", "update_rule": "sgd"},
    "adam": {"strategy": "adam", "learning_rate": 1e-3},
    "accuracy": {"objective": "accuracy"},
    "no evaluation": {"eval_file": None},
    "task": {"task": "sst2", "num_train": 20, "num_dev": 4, "num_eval": 4},
    "data set": {"dataset_test_split": "test"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Output folders of runs, made where the names of user, host and folders are known."""
    home = tmp_path_factory.mktemp("home") / USER
    data = home / "secret-client" / "reviews"
    data.mkdir(parents=True)
    (home / "tiny").symlink_to(EMBEDDED / "model")
    rows = [json.loads(line) for line in (EMBEDDED / "train.jsonl").open()][:24]
    for name, part in (("train", rows), ("dev", rows[:8]), ("test", rows[:8])):
        lines = [json.dumps({**row, "sentence": row["text"]}) for row in part]
        (data / f"{name}.jsonl").write_text("\n".join(lines))
    own = {"train_file": data / "train.jsonl", "eval_file": data / "test.jsonl"}
    elsewhere = dict.fromkeys(own)
    sources = {
        "task": {**elsewhere, "task_data_dir": data, "prompt_template": None, "label_words": None},
        "data set": {**elsewhere, "dataset_name": data},
    }
    with pytest.MonkeyPatch.context() as patch:
        for module, function in ((socket, "gethostname"), (platform, "node")):
            patch.setattr(module, function, lambda: HOST)
        for variable, value in {"HF_TOKEN": TOKEN, "USER": USER, "HOME": str(home)}.items():
            patch.setenv(variable, value)
        found = {}
        for name, changes in RUNS.items():
            found[name] = home / "runs" / name.replace(" ", "-")
            given = {"model_name_or_path": home / "tiny", **own, **sources.get(name, {}), **changes}
            assert main(["train", *options(found[name], **given)]) == 0, name
        yield found


@pytest.mark.parametrize("name", RUNS)
def test_nothing_that_goes_up_knows_this_machine(name: str, runs: dict[str, Path]) -> None:
    folder = runs[name]
    files = public_files(folder, "alice/it")
    contents = [c if isinstance(c, bytes) else c.read_bytes() for c in files.values()]
    places = [str(folder.parents[2]), str(Path.cwd()), str(EMBEDDED)]
    for private in (*places, USER, HOST, "secret-client", TOKEN):
        assert not any(private.encode() in content for content in contents), private
    assert "README.md" in files
    assert "zo_metrics.json" in files
    assert (folder / "zo_base.txt").is_file()
    assert "zo_base.txt" not in files


@pytest.mark.parametrize("name", RUNS)
def test_a_card_says_what_a_reader_needs(name: str, runs: dict[str, Path]) -> None:
    folder = runs[name]
    metrics = json.loads((folder / "zo_metrics.json").read_text())
    card = ModelCard.load(folder / "README.md")
    for said in (
        f"| strategy | {metrics['strategy']} |",
        f"| forward passes | {metrics['forward_passes']} |",
        f"| time (s) | {metrics['wall_seconds']:,} |",
        f"| peak memory (MiB) | {round(metrics['peak_memory_bytes'] / 2**20):,} |",
        f"\n{metrics['command']}\n",
        "from_pretrained(",
        "The base was a folder, `tiny`" if metrics["settings"]["tune"] != "weights" else "`tiny`",
    ):
        assert said in card.text
    zeroth_order = metrics["strategy"] != "adam"
    for said in ("with forward passes only (zeroth-order optimization)", "2601.04710"):
        assert (said in card.text) == zeroth_order
    assert ("with gradients (backpropagation)" in card.text) != zeroth_order
    assert ("zeroth-order" in card.data.tags) == zeroth_order
    adapts = metrics["settings"]["tune"] == "adapter"
    assert card.data.library_name == ("peft" if adapts else "transformers")
    if metrics["metric_after"] is None:
        assert "## Results" not in card.text
        assert card.data.eval_results is None
    else:
        before, after = metrics["metric_before"], metrics["metric_after"]
        assert f"| {metrics['metric_name']} | {before:.4f} | {after:.4f} |" in card.text
        [result] = card.data.eval_results
        assert (result.metric_type, result.metric_value) == (metrics["metric_name"], after)
        index = yaml.safe_load(card.content.split("---\n")[1])["model-index"]
        assert eval_results_to_model_index(*model_index_to_eval_results(index)) == index


@pytest.mark.parametrize("name", RUNS)
def test_the_command_of_a_card_is_that_of_the_run(name: str, runs: dict[str, Path]) -> None:
    metrics = json.loads((runs[name] / "zo_metrics.json").read_text())
    parser = HfArgumentParser((ModelArguments, DataArguments, ZOConfig))
    program, command, *argv = shlex.split(metrics["command"])
    assert (program, command) == ("zo-peft", "train")
    again = settings(*parser.parse_args_into_dataclasses(argv))
    assert json.loads(json.dumps(again)) == metrics["settings"]


def test_cards_pass_the_hubs_own_validation(hub: Hub, runs: dict[str, Path]) -> None:
    script = "import sys; from huggingface_hub import ModelCard\n"
    script += "for path in sys.argv[1:]: ModelCard.load(path).validate()"
    cards = [str(folder / "README.md") for folder in runs.values()]
    env = environment(runs["lora"], hub.url)
    subprocess.run([sys.executable, "-c", script, *cards], env=env, check=True)
    assert hub.requests.count("POST /api/validate-yaml") >= len(cards)
    broken = (runs["lora"] / "README.md").read_text().replace("- zo_peft\n", "- 1\n")
    assert metadata_errors(broken) == ["tags must be strings"]


def test_the_lines_of_a_card_load_from_the_repository(runs: dict[str, Path]) -> None:
    for name in ("lora int8", "weights", "scales nf4"):
        text = (runs[name] / "README.md").read_text()
        title = runs[name].name
        lines = for_repository(text, "alice/it").splitlines()
        changed = [new for new, old in zip(lines, text.splitlines()) if new != old]
        assert len(changed) == (3 if name == "scales nf4" else 2)
        assert all(line.endswith('"alice/it")') for line in changed)
        assert not any(f'"{title}"' in line for line in lines)
        plain, trusting = ('t("{}")', 't("{}", trust_remote_code=True)')
        given = text.replace(plain.format(title), trusting.format(title))
        expected = "\n".join(lines).replace(plain.format("alice/it"), trusting.format("alice/it"))
        assert for_repository(given, "alice/it") == expected + "\n"


def test_a_renamed_folder_loads_from_its_repository(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["lora"], tmp_path / "renamed")
    card = bytes(public_files(tmp_path / "renamed", "alice/it")["README.md"]).decode()
    assert 'model = PeftModel.from_pretrained(base, "alice/it")' in card
    # What is on the Hub stays.
    assert for_repository(card, "alice/other") == card


def test_the_lines_of_a_card_load_what_was_tuned(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = runs["lora nf4"]
    monkeypatch.chdir(folder.parents[1])
    lines = re.search("```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert lines is not None
    loaded: dict[str, Any] = {}
    exec(lines[1].replace('"lora-nf4"', f'"{folder}"'), loaded)
    assert loaded["base"].dtype == torch.bfloat16
    quantization = loaded["base"].config.quantization_config
    assert quantization.bnb_4bit_compute_dtype == torch.bfloat16


def test_a_card_knows_names_of_the_hub_without_an_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = {"models--tiny": "config.json", "datasets--reviews": "README.md"}
    for repository, name in snapshots.items():
        (tmp_path / repository / "refs").mkdir(parents=True)
        (tmp_path / repository / "refs" / "main").write_text("c0ffee")
        (tmp_path / repository / "snapshots" / "c0ffee").mkdir(parents=True)
        (tmp_path / repository / "snapshots" / "c0ffee" / name).touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED / "model")

    def card(base: str, dataset: str) -> ModelCard:
        model.config.name_or_path = base
        chosen = {"model_revision": "main", "dataset_name": dataset, "trust_remote_code": True}
        write_model_card(str(tmp_path / "out"), model, "scales", {"settings": chosen})
        return ModelCard.load(tmp_path / "out" / "README.md")

    (tmp_path / "out").mkdir()
    known = card("tiny", "reviews")
    assert (known.data.base_model, known.data.datasets) == ("tiny", ["reviews"])
    assert 'from_pretrained("tiny", revision="c0ffee", trust_remote_code=True)' in known.text
    assert 'from_pretrained("out", trust_remote_code=True)' in known.text
    for other in (card("/bases/tiny", "nowhere"), card("nowhere", "no--where")):
        assert (other.data.base_model, other.data.datasets) == (None, None)
        assert "The base was a folder" in other.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "README.md",
            "Köln".encode("latin-1"),
            r"README\.md cannot be read: .*; save the run again",
        ),
        ("README.md", f"Use {TOKEN}.", r"README\.md holds a token of the Hub; take it out"),
        ("README.md", "Use t0ken-of-the-call.", r"README\.md holds a token of the Hub"),
        ("README.md", "Use t0ken-of-the-environment.", r"README\.md holds a token of the Hub"),
        ("zo_metrics.json", json.dumps({"a": {TOKEN: 1}}), r"zo_metrics\.json holds a token"),
        ("zo_metrics.json", "{", r"zo_metrics\.json cannot be read: .*; save the run again"),
        ("tokenizer.json", f'{{"a": "{TOKEN}"}}', r"tokenizer\.json holds a token"),
        (
            "tokenizer_config.json",
            f'{{"chat_template": "{TOKEN}"}}',
            r"tokenizer_config\.json holds a token",
        ),
        ("adapter_model.safetensors", "no tensors", r"adapter_model\.safetensors cannot be read: "),
        (
            "adapter_model.safetensors",
            save({"a": torch.zeros(1)}, metadata={"by": TOKEN}),
            r"adapter_model\.safetensors holds a token",
        ),
    ],
)
def test_a_damaged_file_or_a_token_is_not_pushed(
    name: str, content: str | bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "t0ken-of-the-environment")
    bare_adapter(tmp_path)
    assert public_files(tmp_path, "alice/it").keys() == ADAPTER
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        public_files(tmp_path, "alice/it", "t0ken-of-the-call")


@pytest.mark.parametrize(
    ("repo_id", "message", "refusal"),
    [
        ("alice/it", f"By {TOKEN}", r"commit_message holds a token of the Hub"),
        ("a/b/c", "Better", r"a/b/c cannot be pushed: .*'namespace/repo_name'"),
    ],
)
def test_a_dry_run_refuses_what_a_push_would(
    repo_id: str, message: str, refusal: str, tmp_path: Path
) -> None:
    bare_adapter(tmp_path)
    with pytest.raises(UserError, match=refusal):
        push(PushArguments(str(tmp_path), repo_id, commit_message=message, dry_run=True))


def test_folders_in_json_are_known_by_their_names(tmp_path: Path) -> None:
    bare_adapter(tmp_path, base_model_name_or_path=str(tmp_path / "bases" / "opt"), revision=None)
    (tmp_path / "tokenizer_config.json").write_text('{"name_or_path": "facebook/opt-125m"}')
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    files = public_files(tmp_path, "alice/it")
    # The folder is an adapter's, so the model that lies there as well does not go up.
    assert files.keys() == ADAPTER | {"tokenizer_config.json"}
    config = json.loads(files["adapter_config.json"])
    assert config == {"base_model_name_or_path": "opt", "revision": None}
    assert json.loads(files["tokenizer_config.json"]) == {"name_or_path": "facebook/opt-125m"}


def bare_adapter(folder: Path, **config: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")


# ---- Merged models -------------------------------------------------------------------------------


def lora(folder: Path, base: Path, **settings: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An adapter with random A and B in `folder`: its configuration and its tensors."""
    chosen = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**chosen))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder, save_embedding_layers=False)
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def merge(base: Path, adapter: Path, output: Path, *further: str) -> int:
    names = [
        "--model_name_or_path",
        base,
        "--adapter_name_or_path",
        adapter,
        "--output_dir",
        output,
    ]
    return main(["merge", *map(str, names), *further])


def changes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """B @ A of each weight, by the weight's name in the base."""
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    owners = [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]
    return {
        f"{owner.removeprefix(prefix)}.weight": tensors[f"{owner}.lora_B.weight"]
        @ tensors[f"{owner}{suffix}"]
        for owner in owners
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_weight_is_the_sum_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(EMBEDDED / "model", dtype=dtype).save_pretrained(base)
    AutoTokenizer.from_pretrained(EMBEDDED / "model").save_pretrained(base)
    _, tensors = lora(tmp_path / "lora", base, r=3, lora_alpha=5)
    out = tmp_path / "merged"
    assert merge(base, tmp_path / "lora", out, "--max_shard_size", "600KB") == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    shards = {name: load_file(out / name) for name in set(index.values())}
    assert len(shards) > 2
    assert all((out / name).stat().st_size <= 610_000 for name in shards)
    weights, added = load_file(base / "model.safetensors"), changes(tensors)
    assert weights.keys() == index.keys()
    assert len(added) == 8
    for name, weight in weights.items():
        expected = weight
        if name in added:
            expected = (weight.float() + added[name] * (5 / 3)).to(dtype)
            assert not torch.equal(expected, weight)
        assert torch.equal(shards[index[name]][name], expected), name

    ids = torch.tensor([[5, 9, 80, 3]])
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "lora"
    )
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        difference = (plain(ids).logits - adapted(ids).logits).abs().max()
    assert difference < (1e-4 if dtype == torch.float32 else 0.3)
    files = public_files(out, "alice/it")
    assert files.keys() >= {*shards, "config.json", "tokenizer.json", "README.md"}
    card = bytes(files["README.md"]).decode()
    assert "`base` with the adapter `lora` merged into its weights" in card
    assert 'model = AutoModelForCausalLM.from_pretrained("alice/it")' in card
    assert metadata_errors(card) == []


def test_nothing_is_written_when_the_base_has_no_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = tmp_path / "base", tmp_path / "merged"
    AutoModelForCausalLM.from_pretrained(EMBEDDED / "model").save_pretrained(base)
    lora(tmp_path / "lora", base)
    assert merge(base, tmp_path / "lora", out) == 2
    assert "the tokenizer of" in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_base_is_merged_into_only_when_asked(
    bits: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = EMBEDDED / "model", tmp_path / "merged"
    _, tensors = lora(tmp_path / "lora", base, r=3, lora_alpha=5)
    flag = f"--load_in_{bits}bit"
    assert merge(base, tmp_path / "lora", out, flag) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "model is quantized, and rounding to its codes may undo" in said
    assert "give --dequantize" in said
    assert not out.exists()

    assert merge(base, tmp_path / "lora", out, flag, "--dequantize") == 0
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    merged, added = load_file(out / "model.safetensors"), changes(tensors)
    quantized = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=quantization_config(bits == 8, bits == 4)
    )
    for name, change in added.items():
        weight = quantized.get_parameter(name)
        stood_for = int8(weight) if bits == 8 else nf4(weight)
        torch.testing.assert_close(merged[name], stood_for + change * (5 / 3), rtol=1e-5, atol=1e-6)


def int8(weight: Any) -> Tensor:
    """What int8 codes stand for."""
    return weight.data.float() * weight.SCB[:, None] / 127


def nf4(weight: Any) -> Tensor:
    """What NF4 codes stand for, from their table: two in a byte, 64 to a scale."""
    state = weight.quant_state
    codes = torch.stack([weight.data.flatten() >> 4, weight.data.flatten() & 15], -1).flatten()
    return (state.code[codes.long()].view(-1, 64) * state.absmax[:, None]).view(state.shape)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_weight_with_two_uses_is_not_merged_into(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora(tmp_path / "lora", EMBEDDED / "model", target_modules=[target, "q_proj"])
    assert merge(EMBEDDED / "model", tmp_path / "lora", tmp_path / "merged") == 2
    other = {"embed_tokens": "lm_head", "lm_head": "model.embed_tokens"}[target]
    said = f"a weight of one layer that the base also uses as {other}.weight; load it with PEFT"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_an_adapter_with_a_head_is_merged_with_it(runs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "merged"
    assert merge(EMBEDDED / "model", runs["classes"], out) == 0
    tensors = load_file(runs["classes"] / "adapter_model.safetensors")
    [head] = [tensor for name, tensor in tensors.items() if "score" in name]
    assert torch.equal(load_file(out / "model.safetensors")["score.weight"], head)
    assert json.loads((out / "config.json").read_text())["architectures"][0].endswith(
        "ForSequenceClassification"
    )


@pytest.mark.parametrize(
    ("name", "further", "message"),
    [
        ("prefix", [], "PREFIX_TUNING cannot be merged: it adds tokens, or keys and values, and"),
        ("prompt", [], "PROMPT_TUNING cannot be merged: it adds tokens, or keys and values"),
        ("lora", ["--max_shard_size", "much"], "max_shard_size='much'; give a size such as 5GB"),
        ("scales int8", [], r"adapter '.*scales-int8' cannot be loaded: "),
    ],
)
def test_what_cannot_be_merged_is_refused_in_one_line(
    name: str,
    further: list[str],
    message: str,
    runs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert merge(EMBEDDED / "model", runs[name], tmp_path / "merged", *further) == 2
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])
    assert not (tmp_path / "merged").exists()


# ---- Other homes for an adapter ------------------------------------------------------------------


def vllm_errors(config: dict[str, Any], tensors: dict[str, Tensor]) -> set[str]:
    """What vLLM has against an adapter: PEFTHelper, parse_fine_tuned_lora_name, max_lora_rank."""
    errors = {name for name in ("r", "lora_alpha", "target_modules") if config.get(name) is None}
    if config.get("bias", "none") != "none":
        errors.add("bias")
    errors |= {
        name for name in ("use_dora", "lora_bias", "alora_invocation_tokens") if config[name]
    }
    errors |= set(config["modules_to_save"] or ()) - {"classifier", "score"}
    if max([config["r"], *config["rank_pattern"].values()]) > 512:
        errors.add("rank")
    names = re.compile(r"(base_model\.model\.)?.+\.(lora_[AB]\.weight|lora_embedding_[AB])")
    return errors | {name for name in tensors if not names.fullmatch(name)} | unpaired(tensors)


def llama_cpp_errors(config: dict[str, Any], tensors: dict[str, Tensor]) -> set[str]:
    """What convert_lora_to_gguf.py refuses, and what llama.cpp would scale in another way."""
    errors = set() if "lora_alpha" in config else {"lora_alpha"}
    # It knows one alpha, and divides it by the rank of B.
    errors |= {name for name in ("use_rslora", "alpha_pattern") if config[name]}
    known = re.compile(r".*(\.lora_[AB]\.weight|\.lora_embedding_[AB]).*|.*(_layernorm|\.norm).*")
    return errors | {name for name in tensors if not known.fullmatch(name)} | unpaired(tensors)


def unpaired(tensors: dict[str, Tensor]) -> set[str]:
    """A [r, in] without its B [out, r], or the reverse."""
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if found := re.search(r"\.lora_(?:embedding_)?([AB])(?=\.weight|$)", name):
            halves.setdefault(name[: found.start()], {})[found[1]] = tensor
    return {
        owner
        for owner, pair in halves.items()
        if pair.keys() != {"A", "B"} or pair["A"].shape[-2] != pair["B"].shape[-1]
    }


@pytest.mark.parametrize("name", ["lora", "lora int8", "lora nf4", "mezo", "adam"])
def test_other_converters_take_the_layout_of_a_run(name: str, runs: dict[str, Path]) -> None:
    config = json.loads((runs[name] / "adapter_config.json").read_text())
    tensors = load_file(runs[name] / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 4
    for key, tensor in tensors.items():
        assert tensor.shape == ((8, 128) if "lora_A" in key else (128, 8))
        assert tensor.dtype == torch.float32
    assert vllm_errors(config, tensors) == llama_cpp_errors(config, tensors) == set()


@pytest.mark.parametrize(
    ("chosen", "vllm", "llama_cpp"),
    [
        ({"r": 1024}, {"rank"}, set()),
        ({"use_dora": True}, {"use_dora", "lora_magnitude_vector"}, {"lora_magnitude_vector"}),
        ({"use_rslora": True}, set(), {"use_rslora"}),
        ({"modules_to_save": ["lm_head"]}, {"lm_head", "lm_head.weight"}, {"lm_head.weight"}),
        ({"target_modules": ["embed_tokens"]}, set(), set()),
    ],
)
def test_what_other_converters_do_not_take(
    chosen: dict[str, Any], vllm: set[str], llama_cpp: set[str], tmp_path: Path
) -> None:
    config, tensors = lora(tmp_path, EMBEDDED / "model", **chosen)

    def short(errors: set[str]) -> set[str]:
        return {re.sub(r"base_model\.model\.(.*(?=lora_mag))?", "", error) for error in errors}

    assert short(vllm_errors(config, tensors)) == vllm
    assert short(llama_cpp_errors(config, tensors)) == llama_cpp


def test_other_converters_take_no_other_adapters(runs: dict[str, Path]) -> None:
    for name in ("ia3", "vera", "prefix", "prompt"):
        tensors = load_file(runs[name] / "adapter_model.safetensors")
        plain = LoraConfig().to_dict() | {"target_modules": ["q_proj"]}
        assert vllm_errors(plain, tensors)
        assert llama_cpp_errors(plain, tensors)
