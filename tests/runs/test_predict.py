"""Predictions: against plain PEFT, one example at a time; what is read of a run; what is refused."""

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tiny import MODEL, command_line
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from zo_peft import ZOConfig
from zo_peft.cli import main
from zo_peft.data import make_examples
from zo_peft.tools.demo import EMBEDDED
from zo_peft.train.base import BaseTrainer

ROWS = 12
TEXTS = [json.loads(line) for line in (EMBEDDED / "test.jsonl").open()][:ROWS]

#: A turn of the assistant ends with a full stop, which the embedded model writes.
CHAT = """\
{% for m in messages %}{{ m.role }}: {{ m.content }}.
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""

#: Options of each run, beside those of the embedded data.
WORDS = {"one": "terrible,great", "several": '"not at all good","very good, in fact",fine'}
RUNS: dict[str, dict[str, Any]] = {
    "one": {"label_words": WORDS["one"]},
    "several": {"label_words": WORDS["several"], "prompt_template": "{text}\\nIt was "},
    "classes": {"task_type": "SEQ_CLS", "prompt_template": None, "label_words": "bad,good"},
    "chat": {"prompt_template": None, "label_words": None},
    "completions": {"label_words": None, "prompt_template": "{text} The", "label_column": "text"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base that chats, rows to train on, to evaluate on and to answer, and runs."""
    made = tmp_path_factory.mktemp("predict")
    shutil.copytree(MODEL, made / "tiny")
    (made / "tiny" / "chat_template.jinja").write_text(CHAT)
    for name in RUNS:
        rows = TEXTS
        if name == "chat":
            turns = [(f"{row['text'].split()[1]}?", row["text"].removesuffix(".")) for row in TEXTS]
            roles = ("user", "assistant")
            rows = [{"messages": [*map(turn, roles, texts)], "n": 1} for texts in turns]
        write(made / f"{name}.jsonl", rows)
        bare = [
            {k: v for k, v in row.items() if k != "label"} | {"id": n} for n, row in enumerate(rows)
        ]
        write(made / f"{name}.new.jsonl", bare)
    return made


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture(scope="module")
def run_of(folder: Path) -> Callable[[str], Path]:
    """The output folder of a run by name, which is made once."""

    def made(name: str) -> Path:
        out = folder / f"{name}-run"
        if not out.exists():
            file = folder / f"{name}.jsonl"
            given = {"model_name_or_path": folder / "tiny", "train_file": file, "eval_file": file}
            steps = {"max_steps": 2, "learning_rate": 0.05, "save_strategy": "no"}
            argv = command_line(out, **{**given, **steps, "strategy": "gv", **RUNS[name]})
            assert main(["train", *argv]) == 0
        return out

    return made


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def predicted(run: Path, rows: Path, *further: str) -> list[dict[str, Any]]:
    out = rows.with_suffix(".out.jsonl")
    assert (
        main(["predict", str(run), str(rows), "--output_file", str(out), "--use_cpu", *further])
        == 0
    )
    return lines(out.read_text())


# ---- Plain PEFT, one example at a time -----------------------------------------------------------


class Plain:
    """What plain transformers and PEFT answer."""

    def __init__(self, name: str, base: Path, run: Path) -> None:
        kind: Any = AutoModelForCausalLM
        settings: dict[str, Any] = {}
        if name == "classes":
            kind, settings = AutoModelForSequenceClassification, {"num_labels": 2}
        self.model = PeftModel.from_pretrained(kind.from_pretrained(base, **settings), run).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.cut = 0

    @torch.no_grad()
    def words(self, prompt: str, words: list[str]) -> list[float]:
        """A softmax over the words' mean log-probabilities. They stand behind a space."""
        before = self.tokenizer(prompt.rstrip(" ")).input_ids
        scores = []
        for word in words:
            ids = self.tokenizer(f" {word}", add_special_tokens=False).input_ids
            logits = self.model(torch.tensor([before + ids])).logits[0].log_softmax(-1)
            found = [logits[len(before) - 1 + n, id_] for n, id_ in enumerate(ids)]
            scores.append(torch.stack(found).mean())
        return torch.stack(scores).softmax(0).tolist()

    @torch.no_grad()
    def classes(self, text: str) -> list[float]:
        return self.model(**self.tokens(text)).logits[0].softmax(-1).tolist()

    def turn(self, question: str) -> str:
        """The assistant's turn."""
        asked = [turn("user", question)]
        settings = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        return self.text(self.tokenizer.apply_chat_template(asked, **settings), ".")

    def text(self, inputs: Any, end: str = "") -> str:
        """The greedy completion, up to `end`; `cut` counts those that did not come to an end."""
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        [ids] = self.model.generate(**given, do_sample=False, max_new_tokens=64)
        ids = ids[given["input_ids"].shape[1] :]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        ended = self.tokenizer.eos_token_id in ids or (end and end in text)
        self.cut += not ended
        return (text.partition(end)[0] if end else text).strip()

    def tokens(self, text: str) -> Any:
        return self.tokenizer(text, return_tensors="pt", return_token_type_ids=False)


def answers(name: str, plain: Plain) -> list[Any]:
    """The probabilities by label, or the text, of each row."""
    if name == "chat":
        return [plain.turn(f"{row['text'].split()[1]}?") for row in TEXTS]
    if name == "completions":
        return [plain.text(plain.tokens(f"{row['text']} The")) for row in TEXTS]
    if name == "classes":
        return [dict(zip(("bad", "good"), plain.classes(row["text"]))) for row in TEXTS]
    words = next(csv.reader([WORDS[name]]))
    prompt = "{}\nIt was " if name == "several" else "{} It was"
    found = (plain.words(prompt.format(row["text"]), words) for row in TEXTS)
    return [dict(zip(words, shares)) for shares in found]


@pytest.mark.parametrize("name", RUNS)
def test_predictions_are_those_of_plain_peft(
    name: str, folder: Path, run_of: Callable[[str], Path]
) -> None:
    run, asked = run_of(name), folder / f"{name}.new.jsonl"
    found = predicted(run, asked)
    plain = Plain(name, folder / "tiny", run)
    given, expected = lines(asked.read_text()), answers(name, plain)
    assert [{k: row[k] for k in old} for row, old in zip(found, given)] == given
    assert len(found) == len(expected) == ROWS
    for row, answer in zip(found, expected):
        if isinstance(answer, str):
            assert row["prediction"] == answer
            continue
        assert row["probabilities"] == pytest.approx(answer, abs=2e-5)
        assert row["prediction"] == max(answer, key=answer.__getitem__)
        assert row["probability"] == row["probabilities"][row["prediction"]]

    # A trainer answers the same rows in the same way.
    rows: list[dict[str, Any]] = [{"text": row["text"]} for row in TEXTS]
    if name == "chat":
        rows = [{"messages": [row["messages"][0]]} for row in given]
    elif name != "classes":
        template = RUNS[name].get("prompt_template", "{text} It was").replace("\\n", "\n")
        words = next(csv.reader([RUNS[name].get("label_words") or ""]))
        rows = [{"prompt": template.format(**row)} for row in rows]
        rows = [row | ({"options": words} if words else {}) for row in rows]
    args = ZOConfig(str(folder / "unused"), use_cpu=True, disable_tqdm=True)
    trainer = BaseTrainer(plain.model, args, processing_class=plain.tokenizer)
    output = trainer.predict(rows)
    assert output.label_ids is None
    if output.predictions.dtype == object:
        assert [row["prediction"] for row in found] == output.predictions.tolist()
        assert output.metrics["test_cut"] == plain.cut
    else:
        shares = [[*row["probabilities"].values()] for row in found]
        np.testing.assert_allclose(output.predictions, shares, atol=1e-6)
