"""Bases larger than a device: parts of them on disk, streamed once for a wave of candidates."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook
from peft import DeloraConfig, IA3Config, LNTuningConfig, LoraConfig, PeftConfig
from safetensors.torch import load_file, save_file
from tiny import LORA, MODEL, examples, make_trainer
from transformers import AutoModelForCausalLM, PreTrainedModel

from zo_peft import Direction, UserError, ZOTrainer
from zo_peft.models.adapters import add_adapter, load_adapter

LAYERS_ON_DISK = {
    **dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu"),
    **{f"model.layers.{index}": "disk" for index in range(4)},
}
ALL_ON_DISK = {"": "disk"}


def load(device_map: dict[str, str] | None, folder: Path) -> PreTrainedModel:
    settings: dict[str, Any] = {}
    if device_map is not None:
        settings = {"device_map": device_map, "offload_folder": str(folder / "offloaded")}
    return AutoModelForCausalLM.from_pretrained(MODEL, **settings)


def make(
    model: Any, folder: Path, peft_config: PeftConfig | None = LORA, **settings: Any
) -> ZOTrainer:
    defaults = {"max_steps": 3, "per_device_train_batch_size": 4, "report_to": "none"}
    data = {"model": model, "train": examples(count=16)}
    return make_trainer(folder, peft_config, **data, **{**defaults, **settings})


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each offloaded module has been brought in."""
    counts: Counter[str] = Counter()
    pre_forward = AlignDevicesHook.pre_forward

    def counted(self: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        if self.offload:
            counts[str(id(module))] += 1
        return pre_forward(self, module, *args, **kwargs)

    monkeypatch.setattr(AlignDevicesHook, "pre_forward", counted)
    return counts


@pytest.mark.parametrize("device_map", [LAYERS_ON_DISK, ALL_ON_DISK])
def test_an_offloaded_base_is_tuned_as_one_in_memory(
    device_map: dict[str, str], tmp_path: Path
) -> None:
    for folder, where in (("in memory", None), ("on disk", device_map)):
        trainer = make(load(where, tmp_path / folder), tmp_path / folder)
        trainer.train()
        trainer.save_model()
    expected, found = (
        load_file(tmp_path / folder / "adapter_model.safetensors")
        for folder in ("in memory", "on disk")
    )
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(tensor.abs().max() > 0 for name, tensor in found.items() if "lora_B" in name)


def test_weights_are_streamed_once_for_a_wave_of_candidates(
    tmp_path: Path, loads: Counter[str]
) -> None:
    trainer = make(load(LAYERS_ON_DISK, tmp_path), tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    points = [0.01 * Direction.of(seed) for seed in range(8)]
    trainer.evaluator(points, [batch])
    loads.clear()
    trainer.evaluator(points, [batch])
    assert set(loads.values()) == {1}
    trainer.evaluator.candidates_per_forward = 2
    loads.clear()
    trainer.evaluator(points, [batch])
    assert set(loads.values()) == {4}


def test_another_adapter_on_an_offloaded_base(tmp_path: Path) -> None:
    config = IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    )
    trainer = make(load(LAYERS_ON_DISK, tmp_path), tmp_path, config)
    before = {name: tensor.clone() for name, tensor in trainer.space.tensors().items()}
    trainer.train()
    moved = trainer.space.tensors()
    assert all(not torch.equal(moved[name], before[name]) for name in before)


def test_a_saved_adapter_goes_onto_an_offloaded_base(tmp_path: Path) -> None:
    trainer = make(load(None, tmp_path), tmp_path / "run")
    trainer.train()
    trainer.save_model()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = trainer.model(input_ids=ids).logits
        base = load(LAYERS_ON_DISK, tmp_path)
        adapted = load_adapter(base, str(tmp_path / "run"), is_trainable=True).eval()
        found = adapted(input_ids=ids).logits
    torch.testing.assert_close(found, expected)
    trainer = make(adapted, tmp_path / "more", None)
    trainer.train()


def test_half_an_adapter_does_not_go_onto_an_offloaded_base(tmp_path: Path) -> None:
    trainer = make(load(None, tmp_path), tmp_path / "run")
    trainer.save_model()
    path = tmp_path / "run" / "adapter_model.safetensors"
    name, *kept = sorted(tensors := load_file(path))
    save_file({key: tensors[key] for key in kept}, path)
    with pytest.raises(UserError, match=f"it lacks {re.escape(name)}"):
        load_adapter(load(LAYERS_ON_DISK, tmp_path), str(tmp_path / "run"))


def test_the_base_itself_cannot_be_tuned_while_offloaded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="offloaded to the CPU or the disk; tune an adapter"):
        make(load(LAYERS_ON_DISK, tmp_path), tmp_path, None, tune="weights")


@pytest.mark.parametrize(
    "peft_config",
    [
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["down_proj"]),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], use_dora=True),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights="pissa"),
    ],
)
def test_what_starts_from_offloaded_weights_is_refused(
    peft_config: PeftConfig, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"starts from weights that are offloaded|non-finite"):
        add_adapter(load(LAYERS_ON_DISK, tmp_path), peft_config)


@pytest.mark.parametrize(
    "peft_config",
    [
        LNTuningConfig(task_type="CAUSAL_LM"),
        DeloraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
    ],
)
def test_what_reads_offloaded_weights_is_refused(peft_config: PeftConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="may read weights outside of their layers"):
        add_adapter(load(LAYERS_ON_DISK, tmp_path), peft_config)
