"""`zo-peft compare` and `reproduce`: what they run, in which settings, and never twice."""

import json
import re
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.optimize import minimize
from tiny import MODEL, command_line
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser

from zo_peft import UserError
from zo_peft.cli import main
from zo_peft.data import read_rows
from zo_peft.runs import jobs
from zo_peft.runs.arguments import DataArguments, ModelArguments
from zo_peft.tools import compare, readout, reproduce
from zo_peft.tools.demo import EMBEDDED
from zo_peft.tools.reproduce import ReproduceArguments, figure, settings
from zo_peft.train.base import BaseTrainer
from zo_peft.train.config import ZOConfig

DOCS = Path(__file__).parents[2] / "docs"


class Recorded:
    """Stands in for the processes that train; each leaves the metrics that it is given."""

    def __init__(self, metrics: list[dict[str, Any]], code: int = 0) -> None:
        self.metrics, self.code = metrics, code
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess:
        self.commands.append(command)
        if self.code == 0:
            folder = Path(command[command.index("--output_dir") + 1])
            found = self.metrics[len(self.commands) - 1]
            (folder / "zo_metrics.json").write_text(json.dumps(found))
        return subprocess.CompletedProcess(command, self.code)


def recorded(monkeypatch: pytest.MonkeyPatch, *metrics: dict[str, Any], code: int = 0) -> Recorded:
    runner = Recorded(list(metrics), code)
    monkeypatch.setattr(subprocess, "run", runner)
    return runner


def metrics(dev: float, test: float, seconds: float = 1.0) -> dict[str, Any]:
    return {
        "settings": {"model_name_or_path": "tiny", "max_steps": 10},
        "metric_name": "accuracy",
        "metric_dev": dev,
        "metric_after": test,
        "forward_passes": 40,
        "wall_seconds": seconds,
        "peak_memory_bytes": int(seconds * 2**20),
    }


def test_compare_spends_the_same_on_each_strategy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "options.yaml").write_text("lora_target_modules: [q_proj, v_proj]\nuse_cpu: true\n")
    short = {"logging_steps": 4, "max_forward_passes": 48}
    given = {"lora_target_modules": None, "use_cpu": None, "disable_tqdm": None, **short}
    argv = ["compare", "--strategies", "mezo", "adam", "--config", str(tmp_path / "options.yaml")]
    argv += command_line(tmp_path / "out", **given)
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "out/comparison.json").read_text())
    assert {name: run["steps"] for name, run in found.items()} == {"mezo": 24, "adam": 16}
    for run in found.values():
        assert run["forward_passes"] == 48
        assert run["examples_forwarded"] == 48 * 4
    assert (tmp_path / "out/comparison.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out/adam/adapter_model.safetensors").is_file()

    recorded(monkeypatch)  # would fail if anything ran again
    assert main(argv) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["mezo", "adam"]
    assert str(tmp_path / "out/comparison.png") in printed.err
    assert main([*argv, "--seed", "1"]) == 2
    assert "holds a run with other options" in capsys.readouterr().err


def test_seeds_are_summed_up_and_presets_and_the_readout_take_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = (1.0, 2.0, 1.0, 2.0)
    fake = [metrics(0.0, accuracy, s) for accuracy, s in zip((0.6, 0.8, 0.7, 0.7), seconds)]
    common = {"eval_loss_after": 0.5, "metric_before": 0.5, "eval_loss_before": 0.7, "steps": 1}
    runner = recorded(monkeypatch, *(one | common | {"examples_forwarded": 80} for one in fake))
    monkeypatch.setattr(compare, "plot", lambda *_: None)
    argv = ["compare", "--strategies", "ReadOut", "paper-mezo", "--max_forward_passes", "20"]
    (tmp_path / "c.yaml").write_text("prompt_template: '{text} is'\nseed: 7\nseeds: 2\n")
    argv += ["--config", str(tmp_path / "c.yaml"), "--output_dir", str(tmp_path)]
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [command[3] for command in runner.commands] == ["readout", "readout", "train", "train"]
    for command, seed in zip(runner.commands, "7878"):
        assert [command[i + 1] for i, word in enumerate(command) if word == "--seed"][-1] == seed
        assert "--prompt_template={text} is" in command
    assert ("--preset", "paper-mezo") in zip(runner.commands[2], runner.commands[2][1:])
    assert not {"--preset", "--strategy"} & {*runner.commands[0]}
    assert found["readout"]["metric_after"] == pytest.approx(0.7)
    assert found["readout"]["metric_after_std"] == pytest.approx(0.02**0.5)
    assert found["readout"]["wall_seconds"] == 1.5
    assert main(argv) == 0
    assert "0.7000 +- 0.1414" in capsys.readouterr().out
    assert main([*argv, "--seeds", "0"]) == 2
    assert "seeds=0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "given", "message"),
    [
        ("compare", ["--strategy", "gv"], "--strategy is of one run; name what is compared in"),
        ("compare", ["--sede", "3"], "unknown argument --sede (did you mean --seed?)"),
        ("compare", ["--seed", "x"], "argument --seed: invalid int value: 'x'; see zo-peft"),
        ("compare", ["--config"], "argument --config: expected one argument; see zo-peft"),
        ("reproduce", ["--learning_rate", "1"], "--learning_rate is of one run; here are the"),
        ("reproduce", ["--seed=1"], "--seed is of one run; here are the published rates, and"),
    ],
)
def test_an_option_that_no_run_would_heed_is_refused(
    command: str,
    given: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded(monkeypatch)  # would fail if anything ran
    own = {"compare": ["--max_forward_passes", "9"], "reproduce": ["--task", "sst2"]}
    assert main([command, "--model_name_or_path", MODEL, *own[command], *given]) == 2
    assert f"zo-peft: error: {message}" in capsys.readouterr().err


def test_a_readout_needs_the_same_words_in_all_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "It was", "options": words, "label": 0} for words in ("ab", "ba")]
    rows = [{**row, "options": [*row["options"]]} for row in rows]
    args = ZOConfig(str(tmp_path), use_cpu=True)
    trainer = BaseTrainer(MODEL, args, eval_dataset=rows)
    with pytest.raises(UserError, match="a readout needs label words of one token"):
        readout.seen(trainer, trainer.get_eval_dataloader())


def test_the_readout_is_the_best_head_on_the_frozen_states(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On other states, scipy finds no head with a lower loss."""
    argv = ["readout", *command_line(tmp_path, max_forward_passes=8, disable_tqdm=None)]
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "zo_metrics.json").read_text())
    assert found["forward_passes"] == 8
    assert found["eval_loss_after"] < found["eval_loss_before"]
    torch.manual_seed(0)
    states, labels = torch.randn(40, 3).double(), torch.arange(40) % 2
    offsets = torch.randn(40, 2).double()
    v = readout.fitted([states, offsets, labels], 1e-3)

    def penalized(flat: Any) -> float:
        own = torch.tensor(flat, dtype=torch.float64).view(2, 3)
        loss = torch.nn.functional.cross_entropy(offsets + states @ own.T, labels)
        return float(loss + 1e-3 * states.square().sum(1).mean() * own.square().sum())

    least = minimize(penalized, [0.0] * 6).fun
    assert penalized(v.flatten().tolist()) == pytest.approx(least, abs=1e-6)


def test_the_readout_of_classes_sees_what_a_decoder_pools(tmp_path: Path) -> None:
    """The last token of each row, alone and unpadded, and a constant for the bias."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "model")
    model = AutoModelForSequenceClassification.from_pretrained(EMBEDDED / "model", num_labels=3)
    model.config.pad_token_id = tokenizer.pad_token_id
    texts = ["The soup was cold.", "We adored the book and the film.", "Dull"]
    rows = [{"text": text, "label": index} for index, text in enumerate(texts)]
    args = ZOConfig(str(tmp_path), use_cpu=True)
    trainer = BaseTrainer(model, args, eval_dataset=rows, processing_class=tokenizer)
    states, offsets, labels = readout.seen(trainer, trainer.get_eval_dataloader())
    for text, label in zip(texts, range(3)):
        ids = tokenizer(text, return_tensors="pt").input_ids
        alone = model.model(ids).last_hidden_state[0, -1].detach().double()
        (row,) = states[labels == label]
        torch.testing.assert_close(row[:-1], alone, atol=1e-4, rtol=1e-4)
    assert (states[:, -1] == 1).all()
    assert not offsets.any()
    assert offsets.shape == (3, 3)


def test_a_run_that_was_stopped_goes_on_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = recorded(monkeypatch, code=1)
    with pytest.raises(UserError, match=r"the run in a failed"):
        jobs.train(tmp_path / "a", ["--seed", "1"])
    with pytest.raises(UserError, match=r"the run in a failed"):
        jobs.train(tmp_path / "a", ["--seed", "2"])  # nothing was made yet: options may change
    assert all("--resume_from_checkpoint" not in command for command in failing.commands)
    (tmp_path / "a/checkpoint-7").mkdir()
    with pytest.raises(UserError, match="other options"):
        jobs.train(tmp_path / "a", ["--seed", "1"])
    running = recorded(monkeypatch, {"done": True})
    assert jobs.train(tmp_path / "a", ["--seed", "2"]) == {"done": True}
    assert running.commands[0][-2:] == ["--resume_from_checkpoint", "True"]


def test_an_unknown_strategy_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--strategies", "spsa", "--max_forward_passes", "9"]) == 2
    told = "argument --strategies: invalid choice: 'spsa' (choose from 'guided', 'mezo',"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "wanted", "rates"),
    [
        (
            {"preset": "mezo", "peft_type": "LORA"},
            {"lora_r": 8, "lora_alpha": 16, "zo_eps": 1e-2, "max_steps": 20_000},
            (1e-4, 5e-5),
        ),
        (
            {"preset": "mezo", "peft_type": "PREFIX_TUNING"},
            {"num_virtual_tokens": 5, "zo_eps": 1e-1},
            (1e-2, 1e-3),
        ),
        ({"preset": "mezo"}, {"tune": "weights", "zo_eps": 1e-3}, (1e-6, 1e-7)),
        (
            {"preset": "paper-gv"},
            {"tune": "weights", "num_candidates": 2, "max_steps": 10_000},
            (2e-7, 5e-7),
        ),
        (
            {"preset": "paper-greedy", "peft_type": "LORA"},
            {"num_candidates": 2, "max_steps": 10_000, "zo_eps": 1e-2},
            (1e-4, 5e-5),
        ),
    ],
)
def test_settings_are_the_published_ones_and_train_takes_them(
    given: dict[str, Any], wanted: dict[str, Any], rates: tuple[float, ...], tmp_path: Path
) -> None:
    chosen, found_rates = settings(ReproduceArguments(MODEL, "rte", **given))
    assert tuple(found_rates) == rates
    for name, value in (wanted | {"per_device_train_batch_size": 16, "dtype": "float16"}).items():
        assert chosen[name] == value, name
    argv = jobs.flags({**chosen, "learning_rate": rates[0], "output_dir": tmp_path})
    parser = HfArgumentParser((ModelArguments, DataArguments, ZOConfig))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two candidates, as published
        args = parser.parse_args_into_dataclasses(argv)[2]
    assert (args.lr_scheduler_type, args.update_rule, args.noise) == ("constant", "sgd", "gaussian")
    assert args.num_candidates == chosen.get("num_candidates", args.num_candidates)


def test_the_grids_best_point_by_validation_gets_all_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = recorded(
        monkeypatch,
        metrics(0.7, 0.9),
        metrics(0.8, 0.60),
        metrics(0.1, 0.70),
        metrics(0.1, 0.62, 4),
    )
    given = ReproduceArguments(MODEL, "rte", peft_type="LORA", output_dir=str(tmp_path))
    result = reproduce.reproduce(given, ["--max_steps", "10"])
    tried = [command[command.index("--learning_rate") + 1] for command in runner.commands]
    seeds = [command[command.index("--seed") + 1] for command in runner.commands]
    assert (tried, seeds) == (["0.0001", "5e-05", "5e-05", "5e-05"], ["0", "0", "1", "2"])
    # The user's options come last, so they win.
    assert all(command[-4:-2] == ["--max_steps", "10"] for command in runner.commands)
    assert result["metrics"] == [0.60, 0.70, 0.62]
    assert (result["learning_rate"], result["wall_seconds"]) == (5e-05, 2.0)
    table = (tmp_path / "reproduction.md").read_text()
    assert "64.0 +- 5.3" in table
    assert "72.6 (OPT-13B, Table V)" in table
    assert "max_steps 10 (published: 10000)" in table
    assert "model_name_or_path tiny (published: opt-13b)" in table
    assert "lora_r None (published: 8)" in table


def test_a_point_that_diverges_loses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FirstFails(Recorded):
        def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess:
            self.code = 2 if not self.commands else 0
            return super().__call__(command)

    monkeypatch.setattr(subprocess, "run", FirstFails([{}, metrics(0.5, 0.5)]))
    given = ReproduceArguments(MODEL, "cb", peft_type="LORA", seeds=[3], output_dir=str(tmp_path))
    assert reproduce.reproduce(given, [])["learning_rate"] == 5e-05
    recorded(monkeypatch, code=2)
    given.output_dir = str(tmp_path / "all")
    with pytest.raises(UserError, match="failed"):
        reproduce.reproduce(given, [])


def test_published_figures_are_those_that_the_docs_list() -> None:
    """The docs' tables were typed from the paper's, the module's rows from there again."""
    page = (DOCS / "reproduce.md").read_text()
    checked = 0
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        label = re.fullmatch(r"(MeZO|MeZO-GV|SubZero-GV) \((full|LoRA|prefix)\)", cells[0])
        if label and len(cells) == 12:
            for task, value in zip(reproduce.TASKS, cells[1:]):
                assert figure(label[0], task) == f"{value} (OPT-13B, Table V)"
                checked += 1
    assert checked == 8 * 11
    assert figure("MeZO-Greedy (LoRA)", "rte") == "75.8 (OPT-13B, Table IX)"
    assert figure("MeZO-Greedy (full)", "sst2") is None
    assert figure("LOZO (full)", "sst2") is None


def test_a_row_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "sst2"
    data.mkdir()
    for name, count in (("train", 40), ("dev", 20)):
        rows = read_rows(EMBEDDED / "train.jsonl")[:count]
        lines = [f"{row['text']}\t{row['label']}" for row in rows]
        (data / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    argv = [
        *("reproduce", "--model_name_or_path", MODEL, "--task", "sst2", "--peft_type", "LORA"),
        *("--preset", "mezo", "--seeds", "0", "--task_data_dir", str(data), "--max_steps", "2"),
        *("--dtype", "float32", "--use_cpu", "True", "--output_dir", str(tmp_path / "out")),
    ]
    assert main([*argv, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["published"] == "89.6 (OPT-13B, Table V)"
    assert result["forward_passes"] == 4
    assert {float(rate) for rate in result["grid"]} == {1e-4, 5e-5}
    differences = result["differences"]
    assert differences["max_steps"] == [2, 20_000]
    assert differences["dtype"] == ["float32", "float16"]
    assert not {"preset", "lora_r", "zo_eps", "learning_rate", "seed"} & differences.keys()
