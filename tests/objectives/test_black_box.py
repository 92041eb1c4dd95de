"""Black boxes: an adapter tuned at an HTTP server, and functions of the adapter alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines.standin import StandIn
from peft import PeftModel
from safetensors.torch import load_file
from tiny import LORA, MODEL
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts import black_box
from zo_peft import ZOConfig, ZOTrainer
from zo_peft.core.batch import Batch
from zo_peft.data import read_rows
from zo_peft.objectives.scoring import BlackBoxObjective
from zo_peft.tools.demo import EMBEDDED, LABEL_WORDS, TEMPLATE


@pytest.fixture
def server() -> Iterator[StandIn]:
    server = StandIn(AutoModelForCausalLM.from_pretrained(MODEL).eval(), MODEL)
    yield server
    server.stop()


def test_a_servers_loss_falls_and_its_adapter_is_what_was_saved(
    server: StandIn, tmp_path: Path
) -> None:
    before, after = black_box.tune(
        server.url, MODEL, tmp_path, texts=2, max_forward_passes=60, zo_eps=0.03
    )
    assert before == pytest.approx(loss(server.model), 1e-4)  # B is 0: nothing changes yet
    assert after < before - 0.1
    # One adapter for each forward pass, and two for what was printed.
    assert server.asked.count("/v1/load_lora_adapter") == 60 + 2
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), tmp_path).eval()
    assert after == pytest.approx(loss(tuned), 1e-4)


@torch.no_grad()
def loss(model: Any) -> float:
    """Of label words on the first texts."""
    tokenizer, losses = AutoTokenizer.from_pretrained(MODEL), []
    words = [tokenizer(" " + word).input_ids[-1] for word in LABEL_WORDS.split(",")]
    for row in read_rows(EMBEDDED / "train.jsonl")[:2]:
        prompt = tokenizer(TEMPLATE.format(text=row["text"]), return_tensors="pt")
        scores = model(**prompt).logits[0, -1, words].softmax(0)
        losses.append(-scores[row["label"]].log().item())
    return sum(losses) / 2


def test_it_needs_no_data_and_is_given_the_tensors_of_the_file(tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []

    def size(adapter: dict[str, Tensor]) -> float:
        seen.append({name: tensor.clone() for name, tensor in adapter.items()})
        return float(sum(tensor.square().sum() for tensor in adapter.values()))

    trainer = ZOTrainer(
        MODEL,
        ZOConfig(str(tmp_path), max_steps=3, zo_eps=0.01, use_cpu=True, save_strategy="no"),
        peft_config=LORA,
        objective=BlackBoxObjective(size),
    )
    trainer.train()
    assert len(seen) == trainer.forward_passes == 3 * trainer.args.num_candidates
    trainer.save_model()
    saved = load_file(tmp_path / "adapter_model.safetensors")
    trainer.objective.losses(trainer.model, Batch())
    assert seen[-1].keys() == saved.keys()
    assert all(torch.equal(seen[-1][name], saved[name]) for name in saved)
    perturbed = seen[0]
    assert all(not torch.equal(perturbed[name], saved[name]) for name in saved)
