"""What a run is made of beside `ZOConfig`: the model, the adapter and the data."""

import re
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from zo_peft.data.examples import Words, options_of, read_words, write_words
from zo_peft.data.tasks import TASKS
from zo_peft.errors import UserError
from zo_peft.models.hub import first_line
from zo_peft.models.loading import load_config, load_tokenizer, quantization_config
from zo_peft.runs.help import SETS


@dataclass
class ModelArguments:
    """The base and the adapter."""

    model_name_or_path: str = HfArg(help="The base: a Hub id or a folder.")
    model_revision: str = HfArg(default="main", help="Branch, tag or commit of a base on the Hub.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = HfArg(
        default="auto", help="The base's dtype. auto is the one that it was saved in."
    )
    load_in_8bit: bool = HfArg(default=False, help="Quantize the base to int8 with bitsandbytes.")
    load_in_4bit: bool = HfArg(default=False, help="Quantize the base to NF4 with bitsandbytes.")
    bnb_4bit_compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = HfArg(
        default="auto",
        help="What layers of load_in_4bit compute in. auto: the base's dtype, but float32 for "
        "float16 without a GPU.",
    )
    device_map: str | None = HfArg(
        default=None, help="As in transformers, for example auto for several devices."
    )
    trust_remote_code: bool = HfArg(default=False, help="Run the Python code of a Hub model.")
    chat_template: str | None = HfArg(
        default=None,
        help="How messages become text: a Jinja file, or chatml. Default: the adapter's, or "
        "the tokenizer's own.",
    )
    task_type: Literal["CAUSAL_LM", "SEQ_CLS"] = HfArg(
        default="CAUSAL_LM", help="SEQ_CLS: a head for classes. The base may be an encoder."
    )
    adapter_name_or_path: str | None = HfArg(default=None, help="An adapter to evaluate or tune.")
    peft_type: str = HfArg(default="LORA", help="LORA, PREFIX_TUNING, IA3. All of PEFT's types.")
    lora_r: int = HfArg(default=8, help="LoRA's rank.")
    lora_alpha: int = HfArg(default=16, help="LoRA's alpha.")
    lora_target_modules: list[str] | None = HfArg(
        default=None,
        help="Names, all-linear or a regular expression. Names of modules may stand in a list with "
        "commas. Default: those that PEFT adapts in such a model.",
    )
    num_virtual_tokens: int = HfArg(default=5, help="Length of the prefix or of the soft prompt.")

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
        try:
            return config_class(task_type=self.task_type, **taken)
        except (TypeError, ValueError, ImportError) as error:
            raise UserError(
                f"peft_type={self.peft_type!r} needs settings that the command line does not have: "
                f"{first_line(error)} Give a peft_config in Python"
            ) from error


@dataclass
class DataArguments:
    """Labelled text from files, from the Hub or of a benchmark, and how it becomes examples."""

    task: str | None = HfArg(
        default=None, help=f"A benchmark of the paper, as sst2. There are {', '.join(TASKS)}."
    )
    task_data_dir: str | None = HfArg(
        default=None, help="The task's data, as released or as JSON lines. Default: from the Hub."
    )
    num_train: int = HfArg(default=1000, help="How many of a task's examples to train on.")
    num_dev: int | None = HfArg(
        default=None, help="The same, to validate on. Default: 500, or 100 for cb and copa."
    )
    num_eval: int = HfArg(default=1000, help="How many of a task's test examples to evaluate on.")
    shots: int = HfArg(default=0, help="evaluate: answered examples before each prompt.")
    reward_funcs: list[str] | None = HfArg(
        default=None,
        help="Rewards of completions, as module:function. They are maximised. Each takes prompts, "
        "completions and the data's columns, and returns a number for each completion.",
    )
    train_file: str | None = HfArg(default=None, help="JSON, CSV, TSV or Parquet file to train on.")
    eval_file: str | None = HfArg(default=None, help="Such a file to evaluate on, or to answer.")
    dataset_name: str | None = HfArg(default=None, help="A data set on the Hub.")
    dataset_config: str | None = HfArg(default=None, help="The data set's configuration.")
    dataset_train_split: str = HfArg(default="train", help="The data set's split to train on.")
    dataset_test_split: str | None = HfArg(default=None, help="Its split to evaluate on.")
    prompt_template: str | None = HfArg(
        default=None, help="The prompt, with {column} for a row's values. \\n is a new line."
    )
    label_column: str | None = HfArg(
        default=None, help="Column of the label, or of the completion. Default: label."
    )
    label_words: list[str] | None = HfArg(
        default=None,
        help="Words in label order: terrible,great. Or label=word for each, or JSON. auto: the "
        "labels themselves, the default where they are texts that repeat. none: the label column "
        "is text to complete.",
    )

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
