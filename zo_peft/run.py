"""The main jobs, end to end: train an adapter, evaluate one."""

import json
import resource
import sys
import tempfile
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from zo_peft.arguments import DataArguments, ModelArguments
from zo_peft.base_trainer import BaseTrainer
from zo_peft.config import GRADIENT, ZOConfig
from zo_peft.data.examples import Row
from zo_peft.errors import UserError
from zo_peft.gradient import GradientTrainer
from zo_peft.loading import (
    check_quantization,
    load_adapter,
    load_base,
    load_tokenizer,
    public_name,
    quantization_config,
)
from zo_peft.rewards import METRICS, RewardObjective, load_function
from zo_peft.scales import load_scales
from zo_peft.sources import evaluation_examples, training_examples
from zo_peft.tasks import ANSWER_TOKENS, TASKS
from zo_peft.trainer import ZOTrainer

METRICS_NAME = "zo_metrics.json"

#: Arguments of transformers that belong to a run's settings, beside those of zo_peft.
RUN_FIELDS = {
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "max_steps",
    "per_device_train_batch_size",
    "seed",
    "warmup_steps",
    "weight_decay",
}
PATHS = {
    "model_name_or_path",
    "adapter_name_or_path",
    "train_file",
    "eval_file",
    "task_data_dir",
}


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
    metric = f"eval_{trainer.metric_name}"
    trainer.summary = {
        "strategy": args.strategy,
        "steps": trainer.state.global_step,
        "forward_passes": trainer.forward_passes,
        "examples_forwarded": trainer.examples_forwarded,
        "wall_seconds": round(time.time() - psutil.Process().create_time(), 2),
        "peak_memory_bytes": peak_memory_bytes(),
        "metric_name": trainer.metric_name,
        "metric_before": before.get(metric),
        "metric_after": after.get(metric),
        "metric_dev": validated.get(metric),
        "train_loss": result.training_loss,
        "eval_loss_before": before.get("eval_loss"),
        "eval_loss_after": after.get("eval_loss"),
        "tuned_parameters": trainer.tuned_numel,
        "non_finite": trainer.non_finite,
        "skipped": trainer.skipped,
        "processes": args.world_size,
        "calibrations": [asdict(calibration) for calibration in trainer.calibrations],
        "settings": settings(model, data, args),
    }
    trainer.save_model()
    trainer.save_state()
    if args.should_save:
        write_json(Path(args.output_dir) / METRICS_NAME, trainer.summary)
    return trainer.summary


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


def write_json(path: Path, content: Any) -> None:
    """Write JSON in one piece: a reader sees the old file or the new one."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(content, indent=2) + "\n")
    unfinished.replace(path)


def peak_memory_bytes() -> int:
    """Peak so far: of the allocator on CUDA (all devices), else of the process's resident set."""
    if torch.cuda.is_available():
        return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def settings(model: ModelArguments, data: DataArguments, args: ZOConfig) -> dict[str, Any]:
    """What the run was given or chose, without what is unset; paths by their last part."""
    ours = RUN_FIELDS | ZOConfig.__annotations__.keys()
    chosen = {f.name: getattr(args, f.name) for f in fields(args) if f.name in ours}
    given = asdict(model) | asdict(data) | chosen
    return {
        name: public_name(value) if name in PATHS else value
        for name, value in given.items()
        if value not in (None, False)
    }


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
