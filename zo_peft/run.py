"""The main jobs, end to end: train an adapter, evaluate one."""

import json
import resource
import sys
import tempfile
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import datasets
import psutil
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from zo_peft.arguments import DataArguments, ModelArguments
from zo_peft.config import ZOConfig
from zo_peft.data import make_examples, read_rows
from zo_peft.data.examples import Row
from zo_peft.errors import UserError
from zo_peft.loading import (
    check_quantization,
    load_adapter,
    load_base,
    load_tokenizer,
    public_name,
    quantization_config,
)
from zo_peft.scales import load_scales
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
PATHS = {"model_name_or_path", "adapter_name_or_path", "train_file", "eval_file"}


def train(model: ModelArguments, data: DataArguments, args: ZOConfig) -> dict[str, Any]:
    """Tune an adapter and write it to `args.output_dir`, with a card and `zo_metrics.json`.

    Returns:
        The contents of `zo_metrics.json`. `wall_seconds` counts from the start of the process;
        `peak_memory_bytes` is the process's resident set on a CPU, the allocator's peak on CUDA;
        `train_loss` is the mean over the run's steps. Without evaluation data its values are None.

    Raises:
        UserError: something given cannot work; no adapter has been written then.
    """
    rows, eval_rows = _rows(data, "train"), _rows(data, "eval")
    if rows is None:
        raise UserError("nothing to train on; give --train_file or --dataset_name")
    examples = _examples(rows, model, data)
    evaluation = None if eval_rows is None else _examples(eval_rows, model, data)
    trainer = _trainer(model, args, examples, evaluation)
    before = _evaluate(trainer)
    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    after = _evaluate(trainer)
    trainer.summary = {
        "strategy": args.strategy,
        "steps": trainer.state.global_step,
        "forward_passes": trainer.evaluator.forward_passes,
        "examples_forwarded": trainer.evaluator.examples_forwarded,
        "wall_seconds": round(time.time() - psutil.Process().create_time(), 2),
        "peak_memory_bytes": peak_memory_bytes(),
        "metric_name": "accuracy",
        "metric_before": before.get("eval_accuracy"),
        "metric_after": after.get("eval_accuracy"),
        "train_loss": result.training_loss,
        "eval_loss_before": before.get("eval_loss"),
        "eval_loss_after": after.get("eval_loss"),
        "tuned_parameters": trainer.space.numel,
        "calibrations": [asdict(calibration) for calibration in trainer.calibrations],
        "settings": settings(model, data, args),
    }
    trainer.save_model()
    write_json(Path(args.output_dir) / METRICS_NAME, trainer.summary)
    return trainer.summary


def evaluate(model: ModelArguments, data: DataArguments, args: ZOConfig) -> dict[str, Any]:
    """The metric and the loss of an adapter on its base.

    Raises:
        UserError: something given cannot work.
    """
    if model.adapter_name_or_path is None and args.tune == "adapter":
        raise UserError("nothing to evaluate; give --adapter_name_or_path")
    rows = _rows(data, "eval")
    if rows is None:
        raise UserError("nothing to evaluate on; give --eval_file or --dataset_test_split")
    examples = _examples(rows, model, data)
    with tempfile.TemporaryDirectory() as scratch:
        args.output_dir = scratch
        result = _evaluate(_trainer(model, args, None, examples))
    return {
        "metric_name": "accuracy",
        "metric": result["eval_accuracy"],
        "eval_loss": result["eval_loss"],
        "examples": len(examples),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
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


def _rows(data: DataArguments, part: str) -> tuple[str, list[Row]] | None:
    """Name and rows of the part `train` or `eval`; None where none is given."""
    path = {"train": data.train_file, "eval": data.eval_file}[part]
    if path is not None:
        return Path(path).name, read_rows(path)
    split = {"train": data.dataset_train_split, "eval": data.dataset_test_split}[part]
    if data.dataset_name is None or split is None:
        return None
    try:
        rows = datasets.load_dataset(data.dataset_name, data.dataset_config, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"data set {data.dataset_name!r}, split {split!r} cannot be loaded: {first}"
        ) from error
    return data.dataset_name, rows.to_list()


def _examples(rows: tuple[str, list[Row]], model: ModelArguments, data: DataArguments) -> list[Row]:
    return make_examples(
        rows[1],
        source=rows[0],
        prompt_template=data.prompt_template,
        label_column=data.label_column,
        label_words=data.words(),
        classifies=model.task_type == "SEQ_CLS",
    )


def _trainer(
    model: ModelArguments, args: ZOConfig, train: list[Row] | None, evaluation: list[Row] | None
) -> ZOTrainer:
    tokenizer = load_tokenizer(
        model.model_name_or_path,
        revision=model.model_revision,
        trust_remote_code=model.trust_remote_code,
    )
    base: PreTrainedModel | PeftModel = _base(model, args.tune, train or evaluation or [])
    if model.adapter_name_or_path is not None:
        if args.tune == "scales":
            load_scales(base, model.adapter_name_or_path)
        else:
            base = load_adapter(base, model.adapter_name_or_path, is_trainable=True)
    new = model.adapter_name_or_path is None and args.tune == "adapter"
    return ZOTrainer(
        model=base,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        peft_config=model.peft_config() if new else None,
    )


def _base(model: ModelArguments, tune: str, examples: list[Row]) -> PreTrainedModel:
    num_labels = None
    if model.task_type == "SEQ_CLS":
        num_labels = 1 + max(example["label"] for example in examples)
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


def _evaluate(trainer: ZOTrainer) -> dict[str, float]:
    return {} if trainer.eval_dataset is None else trainer.evaluate()
