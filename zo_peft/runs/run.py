"""The main jobs, end to end: train an adapter, evaluate one."""

import shlex
import tempfile
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from zo_peft.data.examples import Row
from zo_peft.data.tasks import ANSWER_TOKENS, TASKS
from zo_peft.errors import UserError
from zo_peft.models.adapters import load_adapter
from zo_peft.models.hub import public_name
from zo_peft.models.loading import (
    check_quantization,
    load_base,
    load_tokenizer,
    quantization_config,
)
from zo_peft.objectives.rewards import METRICS, RewardObjective, load_function
from zo_peft.runs.arguments import DataArguments, ModelArguments
from zo_peft.runs.sources import evaluation_examples, training_examples
from zo_peft.scales import load_scales
from zo_peft.train.base import BaseTrainer
from zo_peft.train.checks import GRADIENT
from zo_peft.train.config import ZOConfig, run_settings
from zo_peft.train.gradient import GradientTrainer
from zo_peft.train.results import METRICS_NAME, given_settings, results, write_json
from zo_peft.train.trainer import ZOTrainer

#: Names of the Hub, or folders; and what is always a file or a folder.
NAMES = {"model_name_or_path", "adapter_name_or_path", "dataset_name"}
FILES = {"train_file", "eval_file", "task_data_dir"}


def train(model: ModelArguments, data: DataArguments, args: ZOConfig) -> dict[str, Any]:
    """Tune an adapter and write it to `args.output_dir`, with a card and `zo_metrics.json`.

    Returns:
        The contents of `zo_metrics.json`. `wall_seconds` counts from the start of the process;
        `peak_memory_bytes` is the process's resident set on a CPU, the allocator's peak on CUDA;
        `train_loss` is the mean over the run's steps. Without evaluation data its values are None.
        Of a benchmark task, they are those of its test examples; `metric_dev` of its validation
        examples, between which and the test examples checkpoints and settings are chosen.

    Raises:
        UserError: something given cannot work; no adapter has been written then.
    """
    classifies, rewarded = model.task_type == "SEQ_CLS", _generates(data, args)
    examples, dev = training_examples(data, classifies, rewarded, args.seed)
    test = evaluation_examples(data, classifies, rewarded)
    kind = GradientTrainer if args.strategy in GRADIENT else ZOTrainer
    trainer = _trainer(kind, model, data, args, examples, dev or test)
    test_set = trainer.eval_dataset if dev is None else trainer.features(test)
    before = _evaluate(trainer, test_set)
    resume: str | bool | None = args.resume_from_checkpoint
    result = trainer.train(resume_from_checkpoint=str(resume).lower() == "true" or resume)
    after = _evaluate(trainer, test_set)
    validated = _evaluate(trainer, trainer.eval_dataset) if dev else {}
    seconds = round(time.time() - psutil.Process().create_time(), 2)
    found = results(trainer, before, after, validated, result.training_loss, seconds)
    said: dict[str, Any] = {
        "command": command(model, data, args),
        "settings": settings(model, data, args),
    }
    if data.task is not None and data.task_data_dir is None:
        said["dataset"] = TASKS[data.task].hub[0]
    trainer.summary = found | said
    if args.should_save:
        write_json(Path(args.output_dir) / METRICS_NAME, trainer.summary)
    trainer.save_model()
    trainer.save_state()
    return trainer.summary


def train_text(metrics: dict[str, Any]) -> str:
    """The contents of `zo_metrics.json` as a few lines."""
    lines = []
    if metrics["metric_after"] is not None:
        name = metrics["metric_name"]
        lines = [
            f"{name:20}{metrics['metric_before']:.4f} -> {metrics['metric_after']:.4f}",
            f"{'evaluation loss':20}{metrics['eval_loss_before']:.4f} -> "
            f"{metrics['eval_loss_after']:.4f}",
        ]
    spent = f"{metrics['forward_passes']:,} in {metrics['steps']:,} steps of {metrics['strategy']}"
    return "\n".join(
        [
            *lines,
            f"{'forward passes':20}{spent}",
            f"{'peak memory':20}{metrics['peak_memory_bytes'] / 2**20:,.0f} MiB",
            f"{'time':20}{metrics['wall_seconds']:.0f} s",
        ]
    )


def evaluate(model: ModelArguments, data: DataArguments, args: ZOConfig) -> dict[str, Any]:
    """The metric and the loss of an adapter on its base; for a task, also of a base alone.

    Raises:
        UserError: something given cannot work.
    """
    if model.adapter_name_or_path is None and data.task is None and args.tune == "adapter":
        raise UserError("nothing to evaluate; give --adapter_name_or_path, or a --task")
    classifies = model.task_type == "SEQ_CLS"
    examples = evaluation_examples(data, classifies, _generates(data, args))
    if examples is None:
        raise UserError("nothing to evaluate on; give --eval_file, --dataset_test_split or --task")
    with tempfile.TemporaryDirectory() as scratch:
        args.output_dir = scratch
        trainer = _trainer(BaseTrainer, model, data, args, None, examples)
        result = trainer.evaluate()
    return {
        "metric_name": trainer.metric_name,
        "metric": result[f"eval_{trainer.metric_name}"],
        "eval_loss": result["eval_loss"],
        "examples": len(examples),
    }


def evaluate_text(result: dict[str, Any]) -> str:
    """The result of `evaluate` in a line."""
    examples = f"on {result['examples']:,} examples"
    return (
        f"{result['metric_name']} {result['metric']:.4f}, loss {result['eval_loss']:.4f} {examples}"
    )


def settings(model: ModelArguments, data: DataArguments, args: ZOConfig) -> dict[str, Any]:
    """What the run was given or chose, without what is unset; paths by their last part."""
    given = given_settings(model, data, args)
    return {name: _told(name, value) for name, value in given.items()}


def command(model: ModelArguments, data: DataArguments, args: ZOConfig) -> str:
    """The command line of such a run: what differs from the defaults, paths by their last part."""
    defaults = {f.name: f.default for part in (model, data, args) for f in fields(part)}
    given = asdict(model) | asdict(data) | run_settings(args)
    words = ["zo-peft", "train"]
    for name, value in (given | {"output_dir": Path(args.output_dir).name}).items():
        if value == defaults[name]:
            continue
        told = _told(name, value)
        values = told if isinstance(told, list) else [] if told is True else [told]
        if name == "prompt_template":
            values = [told.replace("\n", "\\n")]
        words += [f"--{name}", *(getattr(v, "value", str(v)) for v in values)]
    return shlex.join(words)


def _told(name: str, value: Any) -> Any:
    if name in NAMES and value is not None:
        return public_name(value)
    return Path(value).name if name in FILES and value is not None else value


def _generates(data: DataArguments, args: ZOConfig) -> bool:
    return bool(data.reward_funcs) or args.objective in METRICS


def _trainer(
    kind: type[BaseTrainer],
    model: ModelArguments,
    data: DataArguments,
    args: ZOConfig,
    train: list[Row] | None,
    evaluation: list[Row] | None,
) -> Any:
    tokenizer = load_tokenizer(
        model.model_name_or_path,
        revision=model.model_revision,
        trust_remote_code=model.trust_remote_code,
    )
    num_labels = None
    if model.task_type == "SEQ_CLS":
        num_labels = 1 + max(example["label"] for example in train or evaluation or [])
    base: PreTrainedModel | PeftModel = load(model, args.tune, num_labels)
    if model.adapter_name_or_path is not None:
        if args.tune == "scales":
            load_scales(base, model.adapter_name_or_path)
        else:
            base = load_adapter(base, model.adapter_name_or_path, is_trainable=True)
    new = kind.trains and model.adapter_name_or_path is None and args.tune == "adapter"
    answers = None
    if data.task is not None and (rewards := TASKS[data.task].rewards):
        answers = RewardObjective(rewards, tokenizer, [1.0, 0.0], ANSWER_TOKENS)
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


def load(model: ModelArguments, tune: str, num_labels: int | None) -> PreTrainedModel:
    """The base, quantized as asked, after a check that it can be tuned so.

    Raises:
        UserError: it cannot.
    """
    compute_dtype = torch.float32 if model.dtype == "auto" else getattr(torch, model.dtype)
    quantization = quantization_config(
        model.load_in_8bit, model.load_in_4bit, compute_dtype, num_labels is not None
    )
    name = model.model_name_or_path
    source = {"revision": model.model_revision, "trust_remote_code": model.trust_remote_code}
    check_quantization(name, tune, quantization, **source)
    # None would hide that a base was saved in quantized form.
    quantized = {} if quantization is None else {"quantization_config": quantization}
    return load_base(
        name,
        num_labels,
        dtype=model.dtype,
        device_map=model.device_map,
        **source,
        **quantized,
    )


def _evaluate(trainer: BaseTrainer, dataset: Any) -> dict[str, float]:
    return {} if dataset is None else trainer.evaluate(dataset)
