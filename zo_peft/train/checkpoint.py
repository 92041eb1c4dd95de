"""What a checkpoint holds beside the adapter, as safetensors and JSON; nothing is pickled."""

import contextlib
import json
import random
from collections.abc import Mapping
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
from zo_peft.core.faults import Faults
from zo_peft.core.tuner import Tuner
from zo_peft.errors import UserError

TENSORS_NAME = "zo_state.safetensors"
#: This stands before the names of the update rule's tensors.
RULE_PREFIX = "update_rule."
#: What else of the update rule is saved.
RULE_NUMBERS = ("steps", "sensitivity", "backoff")
STATE_NAME = "zo_state.json"
RNG_NAME = "zo_rng_state.json"


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name, in one piece: a reader sees the old file or the new one.

    Raises:
        UserError: the disk is full or may not be written.
    """
    # The tensors may be views into one buffer, which safetensors refuses.
    copies = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    unfinished = path.with_name(path.name + ".tmp")
    try:
        save_file(copies, unfinished)
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path.parent.name}/{path.name} cannot be written: {error}. Earlier checkpoints and "
            "the journal are safe; make room and go on with --resume_from_checkpoint True"
        ) from error


def state_of(tuner: Tuner) -> dict[str, Any]:
    """What a tuner carries from step to step, beside tensors: numbers and lists."""
    return {
        "elite": tuner.elite,
        "zo_eps": tuner.eps.eps,
        "calibrations": [asdict(calibration) for calibration in tuner.eps.calibrations],
        "update_rule": {name: getattr(tuner.rule, name) for name in RULE_NUMBERS},
        "backoff": vars(tuner.backoff),
        "faults": asdict(tuner.faults),
        "candidates_per_forward": tuner.evaluator.candidates_per_forward,
        "forward_passes": tuner.evaluator.forward_passes,
        "examples_forwarded": tuner.evaluator.examples_forwarded,
    }


def load_into(tuner: Tuner, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Give a tuner what `state_of` and `remembered` took from it."""
    tuner.elite, tuner.eps.eps = state["elite"], state["zo_eps"]
    tuner.eps.calibrations = [Calibration(**fields) for fields in state["calibrations"]]
    vars(tuner.rule).update(state["update_rule"])
    for name, tensor in remembered(tuner).items():
        tensor.copy_(tensors[name])
    vars(tuner.backoff).update(state["backoff"])
    tuner.faults = Faults(**state["faults"])
    evaluator = tuner.evaluator
    if evaluator.candidates_per_forward is None:
        evaluator.candidates_per_forward = state["candidates_per_forward"]
    evaluator.forward_passes = state["forward_passes"]
    evaluator.examples_forwarded = state["examples_forwarded"]


def remembered(tuner: Tuner) -> dict[str, Tensor]:
    """The tensors of the update rule, by their names in a checkpoint; no copies."""
    return {
        f"{RULE_PREFIX}{buffer}.{name}": tensor
        for buffer, flats in tuner.rule.buffers.items()
        for index, flat in enumerate(flats)
        for name, tensor in tuner.space.views(index, flat).items()
    }


def without_remembered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint that training has changed."""
    return {n: tensor for n, tensor in tensors.items() if not n.startswith(RULE_PREFIX)}


def save_state(folder: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write tensors by name and a JSON state into `folder`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_tensors(Path(folder) / TENSORS_NAME, tensors)
    (Path(folder) / STATE_NAME).write_text(json.dumps(state, indent=2))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of `save_tensors`, on the CPU.

    Raises:
        UserError: they are missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error


def step_of(folder: str) -> int:
    """The step at which a checkpoint was saved.

    Raises:
        UserError: it is not whole; what is read here is written last.
    """
    try:
        return TrainerState.load_from_json(str(Path(folder) / TRAINER_STATE_NAME)).global_step
    except (OSError, ValueError, TypeError) as error:
        raise _unreadable(Path(folder) / TRAINER_STATE_NAME, error) from error


def last_whole(folder: Path) -> str | None:
    """The last checkpoint in a folder that was written to its end; None without one."""
    found: dict[int, str] = {}
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        with contextlib.suppress(UserError):
            found[step_of(str(path))] = str(path)
    return found[max(found)] if found else None


def load_state(folder: str) -> dict[str, Any]:
    """The JSON state of `save_state`.

    Raises:
        UserError: it is missing or damaged.
    """
    return _read_json(folder, STATE_NAME)


def _read_json(folder: str, name: str) -> dict[str, Any]:
    try:
        return json.loads((Path(folder) / name).read_text())
    except (OSError, ValueError) as error:
        raise _unreadable(Path(folder) / name, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path.parent.name}/{path.name} cannot be read ({type(error).__name__}); resume from a "
        "checkpoint-N folder that ZOTrainer wrote whole, or with resume_from_checkpoint=True"
    )


def save_rng_state(folder: str) -> None:
    """Write the states of Python's, numpy's and torch's generators (CPU and CUDA) as JSON."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "python": [version, words, gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state().tolist(),
        "cuda": [s.tolist() for s in torch.cuda.get_rng_state_all()],
    }
    (Path(folder) / RNG_NAME).write_text(json.dumps(state))


def load_rng_state(folder: str) -> None:
    """Set the generators to what `save_rng_state` wrote; devices that are not here are left out."""
    state = _read_json(folder, RNG_NAME)
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    for device, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(torch.tensor(cuda_state, dtype=torch.uint8), device)
