"""Small models, and runs on the embedded model, which several tests share."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from zo_peft import GradientTrainer, ZOConfig, ZOTrainer
from zo_peft.cli import COMMANDS
from zo_peft.core.noise import noise_blocks
from zo_peft.data import make_examples, read_rows
from zo_peft.runs.help import read_by
from zo_peft.runs.jobs import flags
from zo_peft.tools.demo import EMBEDDED, LABEL_WORDS, TEMPLATE

MODEL = str(EMBEDDED / "model")
LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])

#: What a base of each kind is loaded with.
BASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "int8": {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
    "nf4": {
        "quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    },
}

#: Of the small models. All their widths are multiples of 64, the block size of NF4.
VOCABULARY, PAD, WIDTH, LAYERS, HEADS = 64, 0, 64, 3, 4
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
}


def llama(kind: type[PreTrainedModel] = LlamaForCausalLM, **settings: Any) -> PreTrainedModel:
    sizes = {"intermediate_size": WIDTH, "num_key_value_heads": 2}
    return kind(LlamaConfig(**{**SIZES, **sizes, **settings}))


def bert(
    kind: type[PreTrainedModel] = BertForSequenceClassification, **settings: Any
) -> PreTrainedModel:
    """An encoder, which sees both ways."""
    return kind(BertConfig(**{**SIZES, "intermediate_size": WIDTH, **settings}))


def opt(**settings: Any) -> PreTrainedModel:
    sizes = {"ffn_dim": WIDTH, "word_embed_proj_dim": WIDTH}
    return OPTForCausalLM(OPTConfig(**{**SIZES, **sizes, **settings}))


def gpt2(**settings: Any) -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(**{**SIZES, **settings}))


def examples(part: str = "train", count: int = 40) -> list[dict[str, Any]]:
    """The first texts of the embedded data, with label words as options."""
    rows = read_rows(EMBEDDED / f"{part}.jsonl")[:count]
    return make_examples(rows, part, TEMPLATE, label_words=LABEL_WORDS.split(","))


def make_trainer(
    folder: Path,
    peft_config: PeftConfig | None = LORA,
    kind: type[ZOTrainer | GradientTrainer] = ZOTrainer,
    model: Any = MODEL,
    train: list[dict[str, Any]] | None = None,
    test: list[dict[str, Any]] | None = None,
    callbacks: Any = None,
    **settings: Any,
) -> Any:
    """A trainer on the embedded model or another, for a few short steps unless settings differ.

    Candidates make its steps, unless a strategy or a preset is given.
    """
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "zo_eps": 1e-2 if kind is ZOTrainer else None,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    if kind is ZOTrainer and "preset" not in settings:
        defaults["strategy"] = "gv"
    return kind(
        model,
        ZOConfig(str(folder), **{**defaults, **settings}),
        train_dataset=train or examples(),
        eval_dataset=test or examples("test"),
        processing_class=AutoTokenizer.from_pretrained(MODEL),
        peft_config=peft_config,
        callbacks=callbacks,
    )


def theta(trainer: Any) -> dict[str, Tensor]:
    """What a trainer tunes, as it is now."""
    return {name: tensor.clone() for name, tensor in trainer.space.tensors().items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Bit for bit, by name."""
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


#: Options of a short run on the embedded model.
RUN = {
    "model_name_or_path": MODEL,
    "lora_target_modules": ["q_proj", "v_proj"],
    "train_file": EMBEDDED / "train.jsonl",
    "eval_file": EMBEDDED / "test.jsonl",
    "prompt_template": TEMPLATE,
    "label_words": LABEL_WORDS,
    "zo_eps": 1e-2,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 100,
    "use_cpu": True,
    "disable_tqdm": True,
}


def command_line(folder: Path, **changes: Any) -> list[str]:
    """The options of `RUN`; None removes one, a list has several values."""
    return flags({**RUN, "output_dir": folder, **changes})


def evaluate_line(**changes: Any) -> list[str]:
    """The same, of which the options that `evaluate` does not take are left out."""
    taken = read_by(COMMANDS["evaluate"].reads)
    return flags({n: value for n, value in (RUN | changes).items() if n in taken})


def noise_block(seed: int, *args: Any) -> Tensor:
    """The noise of one seed, flat; the arguments are those of `noise_blocks`."""
    return noise_blocks([seed], *args)[0]
