"""What a run is made of beside `ZOConfig`: the model, the adapter and the data."""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from zo_peft.data.examples import Words, options_of, read_words, write_words
from zo_peft.data.tasks import TASKS
from zo_peft.errors import UserError, explained
from zo_peft.models.loading import load_config, load_tokenizer, quantization_config
from zo_peft.runs.help import SETS

#: What each option means, by name.
HELP: dict[str, str] = yaml.safe_load(Path(__file__).with_name("arguments.yaml").read_bytes())


@dataclass
class ModelArguments:
    """The base and the adapter."""

    model_name_or_path: str = HfArg(help=HELP["model_name_or_path"])
    model_revision: str = HfArg(default="main", help=HELP["model_revision"])
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = HfArg(
        default="auto", help=HELP["dtype"]
    )
    load_in_8bit: bool = HfArg(default=False, help=HELP["load_in_8bit"])
    load_in_4bit: bool = HfArg(default=False, help=HELP["load_in_4bit"])
    bnb_4bit_compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = HfArg(
        default="auto", help=HELP["bnb_4bit_compute_dtype"]
    )
    device_map: str | None = HfArg(default=None, help=HELP["device_map"])
    trust_remote_code: bool = HfArg(default=False, help=HELP["trust_remote_code"])
    chat_template: str | None = HfArg(default=None, help=HELP["chat_template"])
    task_type: Literal["CAUSAL_LM", "SEQ_CLS"] = HfArg(default="CAUSAL_LM", help=HELP["task_type"])
    adapter_name_or_path: str | None = HfArg(default=None, help=HELP["adapter_name_or_path"])
    peft_type: str = HfArg(default="LORA", help=HELP["peft_type"])
    lora_r: int = HfArg(default=8, help=HELP["lora_r"])
    lora_alpha: int = HfArg(default=16, help=HELP["lora_alpha"])
    lora_target_modules: list[str] | None = HfArg(default=None, help=HELP["lora_target_modules"])
    num_virtual_tokens: int = HfArg(default=5, help=HELP["num_virtual_tokens"])

    def __post_init__(self) -> None:
        self.peft_type = self.peft_type.upper()
        given = self.lora_target_modules or []
        if len(given) == 1 and re.fullmatch(r"[\w.]+(,\s*[\w.]+)+", given[0]):
            self.lora_target_modules = re.split(r",\s*", given[0])

    @property
    def source(self) -> dict[str, Any]:
        """The keyword arguments that `from_pretrained` needs to find and read the base."""
        return {"revision": self.model_revision, "trust_remote_code": self.trust_remote_code}

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer, with the chat template of the arguments or of the adapter."""
        chat = self.chat_template, self.adapter_name_or_path
        return load_tokenizer(self.model_name_or_path, *chat, **self.source)

    def quantization(self, has_classes: bool, on_cpu: bool) -> BitsAndBytesConfig | None:
        """How the base, with a head for classes or not, is quantized; None: as it was saved."""
        dtype: torch.dtype | str = self.bnb_4bit_compute_dtype
        if dtype != "auto" and not self.load_in_4bit:
            raise UserError("bnb_4bit_compute_dtype is for load_in_4bit; give both, or auto")
        if dtype == "auto" and self.load_in_4bit:
            saved = load_config(self.model_name_or_path, **self.source).dtype or "float32"
            dtype = saved if self.dtype == "auto" else self.dtype
            # A CPU multiplies float16 several times more slowly than float32.
            dtype = "float32" if on_cpu and dtype in ("float16", torch.float16) else dtype
        return quantization_config(self.load_in_8bit, self.load_in_4bit, dtype, has_classes)

    def peft_config(self) -> PeftConfig:
        """The configuration of a new adapter; a UserError if PEFT does not know the type."""
        if self.peft_type not in PeftType.__members__:
            known = ", ".join(PeftType.__members__)
            raise UserError(f"peft_type={self.peft_type!r} is not known; PEFT has {known}")
        config_class = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(self.peft_type)]
        modules: Any = self.lora_target_modules
        if modules is not None and len(modules) == 1 and not re.fullmatch(r"[\w.]+", modules[0]):
            # PEFT's string: all-linear, or a regular expression.
            modules = modules[0]
        chosen = {"target_modules": modules, "num_virtual_tokens": self.num_virtual_tokens}
        if self.peft_type == "LORA":
            chosen |= {"r": self.lora_r, "lora_alpha": self.lora_alpha}
        taken = {f.name: chosen[f.name] for f in fields(config_class) if f.name in chosen}
        what = f"peft_type={self.peft_type!r} needs settings that the command line does not have"
        errors, advice = (TypeError, ValueError, ImportError), "give a peft_config in Python"
        with explained(what, *errors, advice=advice):
            return config_class(task_type=self.task_type, **taken)


@dataclass
class DataArguments:
    """Labelled text from files, from the Hub or of a benchmark, and how it becomes examples."""

    task: str | None = HfArg(
        default=None, help=f"A benchmark of the paper, as sst2. There are {', '.join(TASKS)}."
    )
    task_data_dir: str | None = HfArg(default=None, help=HELP["task_data_dir"])
    num_train: int = HfArg(default=1000, help=HELP["num_train"])
    num_dev: int | None = HfArg(default=None, help=HELP["num_dev"])
    num_eval: int = HfArg(default=1000, help=HELP["num_eval"])
    shots: int = HfArg(default=0, help=HELP["shots"])
    reward_funcs: list[str] | None = HfArg(default=None, help=HELP["reward_funcs"])
    train_file: str | None = HfArg(default=None, help=HELP["train_file"])
    eval_file: str | None = HfArg(default=None, help=HELP["eval_file"])
    dataset_name: str | None = HfArg(default=None, help=HELP["dataset_name"])
    dataset_config: str | None = HfArg(default=None, help=HELP["dataset_config"])
    dataset_train_split: str = HfArg(default="train", help=HELP["dataset_train_split"])
    dataset_test_split: str | None = HfArg(default=None, help=HELP["dataset_test_split"])
    prompt_template: str | None = HfArg(default=None, help=HELP["prompt_template"])
    label_column: str | None = HfArg(default=None, help=HELP["label_column"])
    label_words: list[str] | None = HfArg(default=None, help=HELP["label_words"])

    def __post_init__(self) -> None:
        self.task = self.task and self.task.lower()
        if isinstance(self.label_words, str):
            self.label_words = [self.label_words]
        if words := self.given_words():
            self.label_words = write_words(words)
        if self.task is not None and self.task not in TASKS:
            raise UserError(f"task={self.task!r} is not known; use one of {', '.join(TASKS)}")
        changed = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        others = SETS["own rows" if self.task else "task alone"]
        if unused := [name for name in changed if name in others]:
            why = "is not used with --task" if self.task else "is only for a --task"
            raise UserError(f"--{unused[0]} {why}; drop one of the two")
        if self.eval_file and self.dataset_test_split:
            raise UserError("give --eval_file or --dataset_test_split, not both")
        of_the_hub = [name for name in changed if name in SETS["data set of the Hub"]]
        if of_the_hub and not self.dataset_name:
            raise UserError(f"--{of_the_hub[0]} is of a --dataset_name; give one, or drop it")
        if self.train_file and self.dataset_name and not self.dataset_test_split:
            raise UserError("give --train_file or --dataset_name, not both")
        if self.prompt_template is not None:
            self.prompt_template = self.prompt_template.replace("\\n", "\n")

    def given_words(self) -> Words | None:
        """The label words as they were given; None if there are none, or if data have them."""
        if self.label_words in (None, ["auto"], ["none"]):
            return None
        return read_words(self.label_words or ())

    def words(self) -> list[str] | None:
        """The label words in label order; None if there are none, or if data have them."""
        words = self.given_words()
        return None if words is None else options_of(words)
