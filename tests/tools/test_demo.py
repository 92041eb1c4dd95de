"""The embedded model and texts: honest, small, and learnable with forward passes only."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from scripts import make_demo_model
from zo_peft.data import read_rows
from zo_peft.tools.demo import EMBEDDED, LABEL_WORDS, TEMPLATE, DemoArguments, demo

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return make_demo_model.write_corpus(0)


def test_the_shipped_texts_are_the_scripts(corpus: list[str]) -> None:
    rows = make_demo_model.write_examples(corpus, 1)
    assert read_rows(EMBEDDED / "train.jsonl") + read_rows(EMBEDDED / "test.jsonl") == rows


def test_the_base_never_saw_the_task(corpus: list[str]) -> None:
    text = "\n".join(corpus)
    assert TEMPLATE.removeprefix("{text} ") not in text
    for part in ("train", "test"):
        assert not any(row["text"] in text for row in read_rows(EMBEDDED / f"{part}.jsonl"))


def test_held_out_texts_are_balanced_and_new() -> None:
    train, test = (read_rows(EMBEDDED / f"{part}.jsonl") for part in ("train", "test"))
    assert len(test) >= 200
    assert 2 * sum(row["label"] for row in test) == len(test)
    assert not {row["text"] for row in train} & {row["text"] for row in test}


def test_it_is_small_and_real() -> None:
    assert (EMBEDDED / "model" / "model.safetensors").stat().st_size <= 3e6
    assert sum(path.stat().st_size for path in EMBEDDED.rglob("*") if path.is_file()) <= 3e6
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "model")
    for word in LABEL_WORDS.split(","):
        assert len(tokenizer(" " + word, add_special_tokens=False)["input_ids"]) == 1


def test_the_demo_learns_on_int8(tmp_path: Path) -> None:
    result = demo(DemoArguments(str(tmp_path), seed=4, max_forward_passes=100))
    assert result["metric_before"] <= 0.65
    assert result["metric_after"] >= 0.9
    assert result["settings"]["load_in_8bit"]
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert config["model_type"] == "llama"
