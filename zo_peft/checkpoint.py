"""The state of a run beside its adapter, as safetensors and JSON; nothing is pickled."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from zo_peft.errors import UserError

TENSORS_NAME = "zo_state.safetensors"
STATE_NAME = "zo_state.json"
RNG_NAME = "zo_rng_state.json"


def save_state(folder: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write tensors by name and a JSON state into `folder`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    # The tensors may be views into one buffer, which safetensors refuses.
    copies = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    save_file(copies, Path(folder) / TENSORS_NAME)
    (Path(folder) / STATE_NAME).write_text(json.dumps(state, indent=2))


def load_tensors(folder: str) -> dict[str, Tensor]:
    """The tensors of `save_state`, on the CPU.

    Raises:
        UserError: they are missing or damaged.
    """
    try:
        return load_file(Path(folder) / TENSORS_NAME)
    except (OSError, SafetensorError) as error:
        raise _no_checkpoint(folder, TENSORS_NAME, error) from error


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
        raise _no_checkpoint(folder, name, error) from error


def _no_checkpoint(folder: str, name: str, error: Exception) -> UserError:
    return UserError(
        f"{Path(folder).name}/{name} cannot be read ({type(error).__name__}); resume from a "
        "checkpoint-N folder that ZOTrainer wrote whole"
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
