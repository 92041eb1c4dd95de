"""Hooks of transformers and accelerate that we override, set or wait for are still called.

One that is renamed upstream would never be called again, and nobody would notice. A test here fails
instead, and names it.
"""

import ast
import inspect
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from textwrap import dedent

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, RandomSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import CallbackHandler, ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from zo_peft import GradientTrainer, ZOConfig, ZOTrainer

#: The methods of Trainer that our trainers override, with the parameters that it gives them.
HOOKS = {
    "_clip_grad_norm": "model",
    "_determine_best_metric": "metrics trial",
    "_get_eval_sampler": "eval_dataset",
    "_get_grad_norm": "model grad_norm",
    "_get_train_sampler": "train_dataset",
    "_load_best_model": "",
    "_load_callback_state": "",
    "_load_from_checkpoint": "resume_from_checkpoint model",
    "_load_optimizer_and_scheduler": "checkpoint",
    "_load_rng_state": "checkpoint",
    "_prepare_inputs": "inputs",
    "_push_from_checkpoint": "checkpoint_folder",
    "_run_epoch": "model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial "
    "ignore_keys_for_eval start_time resume_from_checkpoint epochs_trained "
    "steps_trained_in_current_epoch",
    "_save": "output_dir state_dict",
    "_save_optimizer_and_scheduler": "output_dir",
    "_save_rng_state": "output_dir",
    "_wrap_model": "model training dataloader",
    "compute_loss": "model inputs return_outputs num_items_in_batch",
    "create_accelerator_and_postprocess": "",
    "create_model_card": "language license tags model_name finetuned_from tasks dataset_tags "
    "dataset dataset_args",
    "create_optimizer": "model",
    "create_scheduler": "num_training_steps optimizer",
    "evaluate": "eval_dataset ignore_keys metric_key_prefix",
    "floating_point_ops": "inputs",
    "get_batch_samples": "epoch_iterator num_batches device",
    "get_total_train_batch_size": "args",
    "get_train_dataloader": "",
    "init_hf_repo": "token private",
    "log": "logs start_time",
    "predict": "test_dataset ignore_keys metric_key_prefix",
    "prediction_step": "model inputs prediction_loss_only ignore_keys",
    "push_to_hub": "commit_message blocking token revision private",
    "save_model": "output_dir _internal_call",
    "train": "resume_from_checkpoint trial ignore_keys_for_eval",
    "training_step": "model inputs num_items_in_batch",
}

#: Attributes of Trainer that our trainers set for it to read. (It also has an `objective`, the
#: result of a search for hyperparameters, which our trainers do not support.)
SETTINGS = {"_train_batch_size", "hub_model_id", "model_accepts_loss_kwargs"}
SETTINGS |= {"args", "objective", "optimizer", "push_in_progress"}


@cache
def nodes(cls: type) -> list[ast.AST]:
    """The syntax of a class, each node of it."""
    return list(ast.walk(ast.parse(dedent(inspect.getsource(cls)))))


def attributes(cls: type, context: type[ast.expr_context]) -> set[str]:
    """The attributes of `self` and `super()` that a class reads (`ast.Load`) or sets."""
    return {
        node.attr
        for node in nodes(cls)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, context)
        and ast.unparse(node.value) in ("self", "super()")
    }


def descendants(cls: type) -> Iterator[type]:
    for child in cls.__subclasses__():
        yield from (child, *descendants(child))


OURS = {*ZOTrainer.__mro__, *GradientTrainer.__mro__} - set(Trainer.__mro__)
OWN = {name for owner in OURS for name in (*vars(owner), *attributes(owner, ast.Store))}
READ = {name for owner in OURS for name in attributes(owner, ast.Load)}
TRAINER = {*vars(Trainer), *attributes(Trainer, ast.Store)}


def test_the_lists_are_complete() -> None:
    assert {n for n in OWN if hasattr(Trainer, n) and not n.startswith("__")} == HOOKS.keys()
    assert OWN & attributes(Trainer, ast.Load) - HOOKS.keys() == SETTINGS


@pytest.mark.parametrize("hook", HOOKS)
def test_trainer_calls_a_hook_as_our_method_takes_it(hook: str) -> None:
    upstream = inspect.signature(getattr(Trainer, hook)).parameters.values()
    given = [p.name for p in upstream if p.kind is p.POSITIONAL_OR_KEYWORD]
    # Before transformers 5.23 repositories took no `private`; our methods have it in any case.
    assert {"self", *HOOKS[hook].split()} - {*given} <= {"private"}
    assert given == ["self", *(name for name in HOOKS[hook].split() if name in given)]
    # It is called, or passed to what calls it; `train` and `predict` users call.
    assert hook in attributes(Trainer, ast.Load) | {"train", "predict"}
    for ours in (inspect.signature(vars(owner)[hook]) for owner in OURS if hook in vars(owner)):
        ours.bind(*given)
        for call in nodes(Trainer):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == f"self.{hook}":
                ours.bind("self", *call.args, **{k.arg: k.value for k in call.keywords if k.arg})


@pytest.mark.parametrize("name", sorted(READ - OWN | SETTINGS))
def test_trainer_has_what_our_trainers_use_of_it(name: str) -> None:
    assert name in TRAINER


def test_trainer_reads_the_arguments_that_the_gradient_trainer_sets() -> None:
    read = {ast.unparse(node) for node in nodes(Trainer) if isinstance(node, ast.Attribute)}
    names = ("args.activation_checkpointing", "args.gradient_checkpointing")
    assert any({name, f"{name}_kwargs"} <= read for name in names)


def test_the_fields_that_zoconfig_defines_anew() -> None:
    upstream = {"_VALID_DICT_FIELDS"} | {field.name for field in fields(TrainingArguments)}
    anew = {"learning_rate", "logging_steps", "train_sampling_strategy", "warmup_steps"}
    anew.add("num_train_epochs")
    assert ZOConfig.__annotations__.keys() & upstream == {"_VALID_DICT_FIELDS"} | anew
    assert "self._VALID_DICT_FIELDS" in inspect.getsource(TrainingArguments)


def test_the_events_that_our_callbacks_wait_for() -> None:
    ours = [c for c in descendants(TrainerCallback) if c.__module__.startswith("zo_peft")]
    events = {name for callback in ours for name in vars(callback) if name.startswith("on_")}
    assert {"on_train_begin", "on_log"} <= events
    for event in (*events, "on_push_begin"):
        assert hasattr(TrainerCallback, event), event
        assert hasattr(CallbackHandler, event), event
    assert ProgressCallback().training_bar is None


def test_a_sampler_by_length_draws_its_batches_from_its_generator() -> None:
    sampler = LengthGroupedSampler(batch_size=2, lengths=list(range(20)))
    orders = []
    for seed, sampler.batch_size in ((0, 2), (1, 2), (1, 20), (1, 2)):
        sampler.generator = torch.Generator().manual_seed(seed)
        orders.append(list(sampler))
    assert orders[1] == orders[3]
    assert orders[1] not in (orders[0], orders[2])


def test_accelerate_tells_a_sampler_the_epoch() -> None:
    class Epochs(RandomSampler):
        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    sampler = Epochs([0, 1])
    prepare_data_loader(DataLoader([0, 1], sampler=sampler), num_processes=1).set_epoch(3)
    assert sampler.epoch == 3


def test_accelerate_prepares_a_model_by_the_method_that_our_trainer_replaces() -> None:
    assert "self.prepare_model(" in inspect.getsource(Accelerator)
