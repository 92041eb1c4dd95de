"""The main jobs from start to end: train an adapter, or evaluate one."""

import re
import shlex
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import get_last_checkpoint

from zo_peft.core.journal import JOURNAL_NAME
from zo_peft.data.forms import Row
from zo_peft.data.tasks import ANSWER_TOKENS, TASKS
from zo_peft.data.tokenize import classes_of
from zo_peft.engines.served import load_served
from zo_peft.errors import Notice, UserError
from zo_peft.models.adapters import load_adapter, saved_adapter
from zo_peft.models.hub import check_apart, public_name
from zo_peft.models.loading import load_base, quantization_of
from zo_peft.objectives.rewards import RewardObjective, generates, load_function
from zo_peft.runs.arguments import DataArguments, ModelArguments
from zo_peft.runs.earlier import note_base
from zo_peft.runs.help import SETS
from zo_peft.runs.jobs import flags
from zo_peft.runs.sources import evaluation_examples, training_examples
from zo_peft.scales import load_scales
from zo_peft.train.base import BaseTrainer
from zo_peft.train.checks import GRADIENT
from zo_peft.train.config import ZOConfig, run_settings
from zo_peft.train.gradient import GradientTrainer
from zo_peft.train.results import METRICS_NAME, given, read_results, results, write_json
from zo_peft.train.trainer import ZOTrainer


def train(model: ModelArguments, data: DataArguments, args: ZOConfig) -> dict[str, Any]:
    """Tune an adapter and write it to `args.output_dir`, with a card and `zo_metrics.json`.

    Returns the contents of `zo_metrics.json`, `output_dir`, and the commands that may come `next`,
    one by one. `wall_seconds` counts from the start of the process. With them count the seconds of
    training in earlier processes of the run. `peak_memory_bytes` is the process's resident set on a
    CPU, and the allocator's peak on CUDA. `train_loss` is the mean over the run's steps. The values
    of evaluation are None if there is no evaluation data. For a benchmark task they are of its test
    examples, and `metric_dev` is of its validation examples, on which checkpoints and settings are
    chosen. A UserError says that something in the arguments cannot work; no adapter is written.
    """
    if args.chooses_folder:
        source = Path(data.task or data.train_file or data.dataset_name or "data").stem
        args.output_dir = f"{Path(model.model_name_or_path).resolve().name}-{source}"
    resume = resumes(model, args)
    names = (n for n, value in vars(model).items() if value != getattr(ModelArguments, n, value))
    if unused := sorted({*names} - _told(model, data, args).keys()):
        message = f"not used in this run, because of the other options: --{', --'.join(unused)}"
        warnings.warn(message, Notice, stacklevel=2)
    examples, dev, test = examples_of(model, data, args)
    kind = GradientTrainer if args.strategy in GRADIENT else ZOTrainer
    trainer = trainer_of(kind, model, data, args, examples, dev or test)
    test_set = trainer.eval_dataset if dev is None else trainer.features(test)
    before = _evaluate(trainer, test_set)
    if before:
        trainer.check_metric(before)
    trainer.train(resume_from_checkpoint=resume)
    after = _evaluate(trainer, test_set)
    validated = _evaluate(trainer, trainer.eval_dataset) if dev else {}
    seconds = time.time() - psutil.Process().create_time() + trainer.totals.earlier
    trainer.summary = results(trainer, before, after, validated, test_set, round(seconds, 2))
    # The trainer may have chosen another strategy than the default one.
    told = model, data, trainer.args
    if resume is True:
        _check_same(args.output_dir, trainer.state.global_step, settings(*told))
    trainer.summary |= {"command": command(*told), "settings": settings(*told)}
    trainer.summary["label_words"] = data.words()
    if data.task is not None and data.task_data_dir is None:
        trainer.summary["dataset"] = TASKS[data.task].hub[0]
    if args.should_save:
        write_json(Path(args.output_dir) / METRICS_NAME, trainer.summary)
        note_base(args.output_dir, *filter(None, (model.model_name_or_path, args.tokenizer_name)))
    trainer.save_model()
    trainer.save_state()
    # Programs for chats load whole models.
    merges = trainer.form == "messages" and args.tune == "adapter" and args.engine is None
    merges = merges and not trainer.model.active_peft_config.is_prompt_learning
    return trainer.summary | {"output_dir": args.output_dir, "next": _next(*told, merges)}


def _check_same(folder: str, steps: int, now: dict[str, Any]) -> None:
    """Raise a UserError where a run that was over before is started again with other settings."""
    kept = read_results(folder)
    was = kept["settings"] if kept.get("steps") == steps else now
    for name in sorted({name for name in {**was, **now} if was.get(name) != now.get(name)}):
        what = f"{Path(folder).name} holds a run that is over, with {name}={was.get(name)!r}, and"
        cure = "start it with its own options, or give another --output_dir"
        raise UserError(f"{what} now it is {now.get(name)!r}; {cure}")


def examples_of(
    model: ModelArguments, data: DataArguments, args: ZOConfig
) -> tuple[list[Row], list[Row] | None, list[Row] | None]:
    """Examples to train on, to choose checkpoints on, and to evaluate on."""
    classifies = _classifies(model, data)
    rewarded = generates(data.reward_funcs, args.objective)
    train, dev = training_examples(data, classifies, rewarded, args.seed)
    return train, dev, evaluation_examples(data, classifies, rewarded)


def resumes(model: ModelArguments, args: ZOConfig) -> str | bool | None:
    """What a run goes on from: the end of its journal (True), a checkpoint, or nothing.

    A UserError refuses an output folder in which something would be lost: the base, the adapter
    that is tuned further, or a run that this one does not go on with.
    """
    check_apart(args.output_dir, model.model_name_or_path, model.adapter_name_or_path)
    folder, given = Path(args.output_dir).resolve(), args.resume_from_checkpoint
    words: dict[str, bool | None] = {"true": True, "false": None}
    resume = words.get(str(given).lower(), given)
    journal = (folder / JOURNAL_NAME).is_file()
    checkpoint = folder.is_dir() and get_last_checkpoint(str(folder))
    found = checkpoint and not journal if args.strategy in GRADIENT else journal
    own = resume is True or (resume and Path(str(resume)).resolve().parent == folder)
    if (journal or checkpoint or (folder / METRICS_NAME).is_file()) and not (own and found):
        nothing = ", which left nothing that this strategy can go on from" if own else ""
        cure = "go on with it by --resume_from_checkpoint True and its own options"
        what = f"{args.output_dir} holds a run{nothing}"
        raise UserError(f"{what}; {cure}, or give another --output_dir")
    return resume


def evaluate(model: ModelArguments, data: DataArguments, args: ZOConfig) -> dict[str, Any]:
    """The metric and the loss of an adapter, or of a base alone; or a UserError."""
    rewarded = generates(data.reward_funcs, args.objective)
    examples = evaluation_examples(data, _classifies(model, data), rewarded)
    if examples is None:
        raise UserError("nothing to evaluate on; give a file, --dataset_test_split or --task")
    with tempfile.TemporaryDirectory() as args.output_dir:
        trainer = trainer_of(BaseTrainer, model, data, args, None, examples)
        result = trainer.evaluate()
    return {
        "metric_name": trainer.metric_name,
        "metric": result[f"eval_{trainer.metric_name}"],
        "eval_loss": result["eval_loss"],
        "examples": len(examples),
    }


def _classifies(model: ModelArguments, data: DataArguments) -> bool:
    """Whether the model has a head for classes. The order of one that is there is not in data."""
    classifies = model.task_type == "SEQ_CLS"
    if classifies and model.adapter_name_or_path is not None and data.words() is None:
        data.label_words = ["none"]
    return classifies


def settings(model: ModelArguments, data: DataArguments, args: ZOConfig) -> dict[str, Any]:
    """All options that were given or chosen, as `_told` shows them."""
    return given(_told(model, data, args))


def command(model: ModelArguments, data: DataArguments, args: ZOConfig) -> str:
    """The command line of such a run, without defaults."""
    defaults = {f.name: f.default for part in (model, data, args) for f in fields(part)}
    told = _told(model, data, args) | {"output_dir": Path(args.output_dir).name}
    chosen = {name: value for name, value in told.items() if value != defaults[name]}
    return shlex.join(["zo-peft", "train", *flags(chosen)]).replace("\n", "\\n")


def _next(model: ModelArguments, data: DataArguments, args: ZOConfig, merges: bool) -> list[str]:
    """Commands that use, show, publish and, if so, merge what a run made."""
    folder = args.output_dir
    rows = data.eval_file or data.train_file or "new.csv"
    base = args.tune != "adapter"
    answer = flags({"model_name_or_path": folder, "eval_file": rows}) if base else [folder, rows]
    trust = flags({"trust_remote_code": model.trust_remote_code or None})
    answer += ["--output_file", "predictions.csv", *flags({"engine_url": args.engine_url}), *trust]
    repository = f"you/{re.sub('[^A-Za-z0-9._]+', '-', Path(folder).resolve().name)}"
    lines = [["predict", *answer], ["report", folder], ["push", folder, repository]]
    if merges:
        lines += [["merge", folder, f"{folder}-merged", *trust]]
    return [shlex.join(["zo-peft", *map(str, line)]) for line in lines]


def _told(model: ModelArguments, data: DataArguments, args: ZOConfig) -> dict[str, Any]:
    """The options that had a say in a run, by name. Of a path it has the last part alone."""
    idle = set() if data.dataset_name else {*SETS["data set of the Hub"]}
    idle |= set() if data.task else {*SETS["task alone"]}
    idle |= set() if data.prompt_template else {"label_column"}
    if args.tune != "adapter" or model.adapter_name_or_path is not None:
        idle |= {"peft_type", "num_virtual_tokens", "lora_target_modules", *SETS["lora"]}
    else:
        prompts = model.peft_config().is_prompt_learning
        idle.add("lora_target_modules" if prompts else "num_virtual_tokens")
        idle |= set() if model.peft_type == "LORA" else {*SETS["lora"]}
    rewarded = generates(data.reward_funcs, args.objective)
    told = asdict(model) | asdict(data) | run_settings(args, rewarded)
    told["tokenizer_name"] = args.tokenizer_name
    told |= {name: public_name(told[name]) for name in SETS["names"] if told[name]}
    told |= {name: Path(told[name]).name for name in SETS["paths"] if told[name]}
    return {name: value for name, value in told.items() if name not in idle}


def trainer_of(
    kind: type[BaseTrainer],
    model: ModelArguments,
    data: DataArguments,
    args: ZOConfig,
    train: list[Row] | None = None,
    evaluation: list[Row] | None = None,
) -> Any:
    """A trainer of this kind for these arguments; its model and its data are loaded."""
    served, tokenizer = _served(model, args) if args.engine else (None, model.tokenizer())
    num_labels, words = _num_labels(model, data, args.tune, train), data.words() or []
    # A new head is part of the run.
    set_seed(args.seed)
    base: PreTrainedModel | PeftModel = served or load(model, args.tune, num_labels, words)
    if model.adapter_name_or_path is not None:
        if args.tune == "scales":
            load_scales(base, model.adapter_name_or_path)
        else:
            base = load_adapter(base, model.adapter_name_or_path, is_trainable=True)
    new = kind.trains and model.adapter_name_or_path is None and args.tune == "adapter"
    rewards = () if data.task is None else TASKS[data.task].rewards
    answers = RewardObjective(rewards, tokenizer, [1.0, 0.0], ANSWER_TOKENS) if rewards else None
    return kind(
        model=base,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        peft_config=model.peft_config() if new else None,
        reward_funcs=[load_function(name) for name in data.reward_funcs or ()],
        eval_objective=answers,
    )


def _num_labels(
    model: ModelArguments, data: DataArguments, tune: str, train: list[Row] | None
) -> int | None:
    """The classes of the head, None without one; a UserError where the adapter has others."""
    num_labels, words = None, data.words() or []
    if model.task_type == "SEQ_CLS":
        # A new head that nobody trains would answer at random, so it gets no classes.
        trained = train is not None or model.adapter_name_or_path is not None
        num_labels = trained * (len(words) or classes_of(train))
    if model.adapter_name_or_path is None or tune != "adapter":
        return num_labels
    config, classes = saved_adapter(model.adapter_name_or_path)
    if (config.task_type == "SEQ_CLS") != (model.task_type == "SEQ_CLS"):
        what = f"the adapter is of task_type {config.task_type}, not {model.task_type}"
        raise UserError(f"{what}; give its own --task_type")
    own = read_results(model.adapter_name_or_path).get("label_words") or words
    swapped = own != words and sorted(own) == sorted(words)
    if classes and words and (len(words) != classes or swapped):
        order = f"order: {', '.join(own)}" if len(own) == classes else "order"
        cure = f"give a label word for each, in their {order}"
        raise UserError(f"the adapter's head has {classes} classes; {cure}")
    return classes or num_labels


def _served(
    model: ModelArguments, args: ZOConfig
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A base for which an engine answers, and its tokenizer; or a UserError."""
    for name in (*SETS["loading"], "task_type"):
        if getattr(model, name) != getattr(ModelArguments, name):
            raise UserError(f"--{name} is for a base in PyTorch; drop it, or --engine")
    assert args.engine is not None
    chat = model.chat_template, model.adapter_name_or_path
    source = args.tokenizer_name
    return load_served(model.model_name_or_path, args.engine, source, *chat, **args.servers)


def load(
    model: ModelArguments, tune: str, num_labels: int | None, words: Sequence[str] = ()
) -> PreTrainedModel:
    """The base, as `load_base` gives it, quantized if the arguments say so; or a UserError.

    The dtype that 4-bit layers compute in is written into the arguments, for the run's records.
    """
    kwargs = {"dtype": model.dtype, "device_map": model.device_map, **model.source}
    # If it is None, it must not be given: it would hide that the base was saved quantized.
    if quantization := model.quantization(num_labels is not None, not torch.cuda.is_available()):
        kwargs["quantization_config"] = quantization
    base = load_base(model.model_name_or_path, num_labels, tune, words, **kwargs)
    if model.load_in_4bit:
        model.bnb_4bit_compute_dtype = quantization_of(base.config)["bnb_4bit_compute_dtype"]
    return base


def _evaluate(trainer: BaseTrainer, dataset: Any) -> dict[str, float]:
    return {} if dataset is None else trainer.evaluate(dataset)
