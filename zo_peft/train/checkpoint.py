"""What a checkpoint holds beside the adapter, as safetensors and JSON; nothing is pickled."""

import contextlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from zo_peft.core.eps import Calibration
from zo_peft.core.space import Space
from zo_peft.core.tuner import Tuner
from zo_peft.errors import UserError
from zo_peft.models import recipe
from zo_peft.models.in_place_space import InPlaceSpace
from zo_peft.scales import save_scales
from zo_peft.train.base import BaseTrainer

TENSORS_NAME = "zo_state.safetensors"
#: This stands before the names of the update rule's tensors.
RULE_PREFIX = "update_rule."
STATE_NAME = "zo_state.json"
RNG_NAME = "zo_rng_state.json"


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name, in one piece: a reader sees the old file or the new one."""
    # The tensors may be views into one buffer, which safetensors refuses.
    copies = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    unfinished = path.with_name(path.name + ".tmp")
    try:
        save_file(copies, unfinished)
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:
        why = f"{path.parent.name}/{path.name} cannot be written: {error}. Earlier steps are safe;"
        raise UserError(f"{why} make room and go on with --resume_from_checkpoint True") from error


def _carried(tuner: Tuner) -> dict[str, tuple[object, Sequence[str]]]:
    """What a tuner carries from step to step beside tensors: objects, and their attributes."""
    spent = ("candidates_per_forward", "forward_passes", "examples_forwarded")
    return {
        "tuner": (tuner, ("checksum", "parts", "elite")),
        "eps": (tuner.eps, ("eps",)),
        "rule": (tuner.rule, tuner.rule.NUMBERS),
        "backoff": (tuner.backoff, list(vars(tuner.backoff))),
        "faults": (tuner.faults, list(vars(tuner.faults))),
        "evaluator": (tuner.evaluator, spent),
    }


def state_of(tuner: Tuner) -> dict[str, Any]:
    """What a tuner carries from step to step, beside tensors: numbers and lists."""
    carried = _carried(tuner).items()
    state = {name: {n: getattr(whole, n) for n in names} for name, (whole, names) in carried}
    chosen = [asdict(calibration) for calibration in tuner.eps.calibrations]
    return {**state, "calibrations": chosen, "guided": tuner.guided and tuner.guided.state}


def load_into(tuner: Tuner, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Give a tuner what `state_of` and `remembered` took from it."""
    given = tuner.evaluator.candidates_per_forward
    for name, (whole, _) in _carried(tuner).items():
        vars(whole).update(state[name])
    tuner.evaluator.candidates_per_forward = given or tuner.evaluator.candidates_per_forward
    tuner.eps.calibrations[:] = [Calibration(**fields) for fields in state["calibrations"]]
    if tuner.guided is not None:
        tuner.guided.state = state["guided"]
    for name, tensor in remembered(tuner).items():
        tensor.copy_(tensors[name])


def remembered(tuner: Tuner) -> dict[str, Tensor]:
    """The tensors of the update rule, by their names in a checkpoint; no copies."""
    return {
        f"{RULE_PREFIX}{buffer}.{name}": tensor
        for buffer, flats in tuner.rule.buffers.items()
        for index, flat in enumerate(flats)
        for name, tensor in tuner.space.views(index, flat).items()
    }


def save_state(folder: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write tensors by name and a JSON state into `folder`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_tensors(Path(folder) / TENSORS_NAME, tensors)
    (Path(folder) / STATE_NAME).write_text(json.dumps(state, indent=2))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of `save_tensors`, on the CPU; a UserError if they are missing or damaged."""
    with _reading(path):
        return load_file(path)


def step_of(folder: str, checksums: Sequence[int] | None = None) -> int:
    """The step of a checkpoint; a UserError if it is not whole, or not of these records."""
    # This file is written last.
    path = Path(folder) / TRAINER_STATE_NAME
    with _reading(path):
        step = TrainerState.load_from_json(str(path)).global_step
    if checksums is None:
        return step
    if load_state(folder).get("tuner", {}).get("checksum") not in checksums[step - 1 : step]:
        advice = "resume with resume_from_checkpoint=True, or from a checkpoint of this run"
        raise UserError(f"{Path(folder).name} belongs to another run than the journal; {advice}")
    return step


def last_whole(folder: Path, checksums: Sequence[int] | None = None) -> str | None:
    """The last checkpoint in a folder for which `step_of` gives a step; None without one."""
    found: dict[int, str] = {}
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        with contextlib.suppress(UserError):
            found[step_of(str(path), checksums)] = str(path)
    return found[max(found)] if found else None


def load_state(folder: str, name: str = STATE_NAME) -> dict[str, Any]:
    """A JSON file of a checkpoint; a UserError if it is missing or damaged."""
    path = Path(folder) / name
    with _reading(path):
        return json.loads(path.read_text())


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Within the context, a file that is missing or damaged is a UserError."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, TypeError, RecursionError) as error:
        why = f"{path.parent.name}/{path.name} cannot be read ({type(error).__name__})"
        advice = "resume from a whole checkpoint-N folder, or with resume_from_checkpoint=True"
        raise UserError(f"{why}; {advice}") from error


class CheckpointTrainer(BaseTrainer):
    """Saves and loads what a tuner tunes and remembers, in the place of Trainer's pickles.

    `ready` of a subclass sets the attributes; `base_hash` is None where an adapter is tuned.
    """

    tuner: Tuner
    space: Space
    base_hash: str | None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter, or the tuned base, with tokenizer and card; see `Trainer.save_model`.

        A checkpoint gets no copy of a whole base: its state holds the tensors that are tuned.
        """
        if self.args.tune == "adapter" or not _internal_call:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            # transformers asks whether the best checkpoint is there.
            Path(output_dir or self.args.output_dir).mkdir(parents=True, exist_ok=True)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and self.args.tune == "scales":
            assert isinstance(self.space, InPlaceSpace)
            assert self.base_hash is not None
            save_scales(output_dir or self.args.output_dir, self.space, self.base_hash)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.tuner.compare_ranks(self.state.global_step)
        if not self.args.should_save:
            return
        state = state_of(self.tuner) | {
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "base": self.base_hash,
            "moves": getattr(self.space, "moves", 0),
        }
        # A checkpoint is a position in the journal, so the journal is on the disk before it.
        self.tuner.journal.sync()
        save_state(output_dir, self._trained() | remembered(self.tuner), state)

    def _trained(self) -> dict[str, Tensor]:
        """All tensors that training may have changed, by name."""
        return recipe.trained(self.model, self.space)

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is None:
            return
        state = load_state(checkpoint_folder)
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        for group, lr in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr()):
            group["lr"] = lr
        load_into(self.tuner, state, load_tensors(Path(checkpoint_folder) / TENSORS_NAME))
        if isinstance(self.space, InPlaceSpace):
            self.space.moves = state["moves"]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *_: Any, **__: Any) -> None:
        if load_state(resume_from_checkpoint)["base"] != self.base_hash:
            why = f"{Path(resume_from_checkpoint).name} is of another base or another tune"
            raise UserError(f"{why}; load the model of that run, quantized in the same way")
        tensors = load_tensors(Path(resume_from_checkpoint) / TENSORS_NAME)
        self._load_trained({n: t for n, t in tensors.items() if not n.startswith(RULE_PREFIX)})

    def _load_trained(self, tensors: dict[str, Tensor]) -> None:
        if tensors or self.args.tune != "weights":
            recipe.load_trained(self.model, self.space, tensors)

    def _save_rng_state(self, output_dir: str) -> None:
        """Write the states of Python's, numpy's and torch's generators (CPU and CUDA) as JSON."""
        if not self.args.should_save:
            return
        state = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all(),
        }
        text = json.dumps(state, default=lambda array: array.tolist())
        (Path(output_dir) / RNG_NAME).write_text(text)

    def _load_rng_state(self, checkpoint_folder: str | None) -> None:
        """Set the generators to what was written; devices that are not here are left out."""
        if checkpoint_folder is None:
            return
        state = load_state(checkpoint_folder, RNG_NAME)
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        np.random.set_state(tuple(state["numpy"]))
        torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
        for device, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(torch.tensor(cuda_state, dtype=torch.uint8), device)
