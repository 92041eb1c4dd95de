"""What a run is made of, beside `ZOConfig`: model, adapter and data, as command-line arguments."""

from dataclasses import dataclass, field, fields
from typing import Literal

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from zo_peft.data.tasks import TASKS
from zo_peft.errors import UserError


@dataclass
class ModelArguments:
    """The base model and the adapter."""

    model_name_or_path: str = field(metadata={"help": "Base model: Hub id or folder."})
    model_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit of a Hub model."}
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "The base's dtype; auto: as it was saved."}
    )
    load_in_8bit: bool = field(
        default=False, metadata={"help": "Quantize the base with bitsandbytes' LLM.int8()."}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Quantize the base with bitsandbytes' NF4."}
    )
    device_map: str | None = field(
        default=None, metadata={"help": "As in transformers, e.g. auto for several devices."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the Python code that a Hub model brings along."}
    )
    task_type: Literal["CAUSAL_LM", "SEQ_CLS"] = field(
        default="CAUSAL_LM",
        metadata={"help": "SEQ_CLS: a sequence-classification head on a decoder or encoder."},
    )
    adapter_name_or_path: str | None = field(
        default=None, metadata={"help": "An adapter to evaluate, or to go on tuning."}
    )
    peft_type: str = field(
        default="LORA",
        metadata={"help": "PEFT's name: LORA, PREFIX_TUNING, PROMPT_TUNING, IA3, VERA ..."},
    )
    lora_r: int = field(default=8, metadata={"help": "LoRA's rank."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA's alpha."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Modules to adapt. Default: PEFT's own for this kind of model."},
    )
    num_virtual_tokens: int = field(
        default=5, metadata={"help": "Length of the prefix or of the soft prompt."}
    )

    def peft_config(self) -> PeftConfig:
        """The configuration of a new adapter.

        Raises:
            UserError: PEFT does not know the type.
        """
        if self.peft_type not in PeftType.__members__:
            known = ", ".join(PeftType.__members__)
            raise UserError(f"peft_type={self.peft_type!r} is not known; PEFT has {known}")
        config_class = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(self.peft_type)]
        known_fields = {f.name for f in fields(config_class)}
        chosen = {
            "target_modules": self.lora_target_modules,
            "num_virtual_tokens": self.num_virtual_tokens,
        }
        if self.peft_type == "LORA":
            chosen |= {"r": self.lora_r, "lora_alpha": self.lora_alpha}
        kwargs = {name: value for name, value in chosen.items() if name in known_fields}
        return config_class(task_type=self.task_type, **kwargs)


@dataclass
class DataArguments:
    """Labelled text: files or a data set of the Hub, and how it becomes examples."""

    task: str | None = field(
        default=None,
        metadata={
            "help": "A benchmark of the paper: sst2, rte, cb, boolq, wsc, wic, multirc, copa, "
            "record, squad or drop."
        },
    )
    task_data_dir: str | None = field(
        default=None,
        metadata={"help": "Its data, as released or as JSON lines. Default: from the Hub."},
    )
    num_train: int = field(default=1000, metadata={"help": "A task's examples to train on."})
    num_dev: int | None = field(
        default=None,
        metadata={"help": "And to validate on. Default: 500; 100 for cb and copa."},
    )
    num_eval: int = field(default=1000, metadata={"help": "A task's test examples."})
    shots: int = field(
        default=0, metadata={"help": "evaluate: answered examples before each prompt (in-context)."}
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Functions of generated completions to maximise, as module:function; each "
            "takes prompts, completions and the data's columns, and returns a number for each."
        },
    )
    train_file: str | None = field(
        default=None, metadata={"help": "JSON lines, CSV or TSV file to train on."}
    )
    eval_file: str | None = field(default=None, metadata={"help": "The same, to evaluate on."})
    dataset_name: str | None = field(default=None, metadata={"help": "A data set of the Hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    dataset_train_split: str = field(default="train", metadata={"help": "Its split to train on."})
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "Its split to evaluate on."}
    )
    prompt_template: str | None = field(
        default=None,
        metadata={"help": "The prompt, with {column} for a row's values and \\n for a new line."},
    )
    label_column: str = field(
        default="label", metadata={"help": "Column of the label, or of the completion."}
    )
    label_words: str | None = field(
        default=None,
        metadata={"help": "Label words in label order, separated by commas: terrible,great."},
    )

    def __post_init__(self) -> None:
        if self.task is not None and self.task not in TASKS:
            raise UserError(f"task={self.task!r} is not known; use one of {', '.join(TASKS)}")
        if self.prompt_template is not None:
            self.prompt_template = self.prompt_template.replace("\\n", "\n")

    def words(self) -> list[str] | None:
        """The label words, one by one."""
        return None if self.label_words is None else self.label_words.split(",")
