"""`zo-peft replay` rebuilds a run from its journal, `zo-peft journal` shows the journal.

A replay needs neither data nor forward passes.
"""

import json
import math
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, get_args

from peft import PeftModel
from peft.mapping import get_peft_config
from transformers import PreTrainedModel, set_seed
from transformers.hf_argparser import HfArg

from zo_peft.core.journal import INITIAL_NAME, read
from zo_peft.core.noise import GENERATOR
from zo_peft.core.tuner import move
from zo_peft.engines.engine import EngineName
from zo_peft.engines.served import shapes_of
from zo_peft.errors import UserError, explained
from zo_peft.models.adapters import add_adapter, prepare
from zo_peft.models.hub import check_apart
from zo_peft.models.in_place_space import InPlaceSpace
from zo_peft.models.loading import base_hash, identity, load_config, load_tokenizer
from zo_peft.models.recipe import check_in_place, load_trained, rule_of, space_of
from zo_peft.runs.arguments import ModelArguments
from zo_peft.runs.run import load
from zo_peft.scales import save_scales
from zo_peft.train.checkpoint import load_tensors


@dataclass
class ReplayArguments:
    """Which run is rebuilt, and where to."""

    journal: str = HfArg(help="The run's zo_journal, beside zo_initial.safetensors.")
    output_dir: str = HfArg(help="Folder for the adapter, the scales or the model.")
    until_step: int | None = HfArg(default=None, help="Stop after this many steps. Default: all.")


@dataclass
class ShowArguments:
    """Which journal is shown."""

    action: Literal["show"] = HfArg(help="show: print the journal.")
    journal: str = HfArg(help="A run's zo_journal.")


def replay(arguments: ModelArguments, given: ReplayArguments) -> dict[str, Any]:
    """Rebuild an adapter (or scales, or weights) from its base, starting values and journal.

    On the same kind of device the result has the same bits. `arguments` count for the base
    alone; where an engine had it, for the configuration and tokenizer of what was converted.

    A UserError says that the journal is damaged or of another base; nothing is written then.
    """
    path, name = Path(given.journal), arguments.model_name_or_path
    check_apart(given.output_dir, name, str(path.parent))
    header, records = read(path)
    foreign = f"{path.name} is not of this version of zo_peft"
    if missing := {"generator", "space", "rule", "seed", "base", "adapter"} - header.keys():
        raise UserError(f"{foreign}: its header has no {', '.join(sorted(missing))}")
    if header["generator"] != GENERATOR:
        raise UserError(f"{path.name} has noise of {header['generator']!r}, not of {GENERATOR!r}")
    if header.get("guide"):
        why = "whose gradients come from the training data and are not in the journal"
        cure = "go on from a checkpoint with --resume_from_checkpoint"
        raise UserError(f"{path.name} is of strategy 'guided', {why}; {cure}")
    tune = header["space"]["tune"]
    set_seed(header["seed"])
    model: PreTrainedModel | PeftModel
    if served := header["base"]["loaded"].split()[0] in get_args(EngineName):
        model = shapes_of(load_config(name, **arguments.source))
    else:
        model = load(arguments, tune, header["num_labels"])
    if header["adapter"] is not None:
        config = {**header["adapter"], "base_model_name_or_path": None}
        model = add_adapter(model, get_peft_config(config))
    prepare(model, load_tokenizer(name, **arguments.source))
    if not served and identity(model) != header["base"]:
        cure = "give the run's own, loaded as it was"
        raise UserError(f"{path.name} is of another base than {name}; {cure}")
    base = base_hash(model) if tune == "scales" else ""
    check_in_place(model, tune)
    with explained(foreign, KeyError, TypeError):
        space = space_of(model, **header["space"])
        rule, last = rule_of(space, **header["rule"]), None
    if initial := load_tensors(path.with_name(INITIAL_NAME)):
        load_trained(model, space, initial)
    until = math.inf if given.until_step is None else given.until_step
    for last in takewhile(lambda record: record.step < until, records):
        move(rule, last)
    save = {"save_embedding_layers": False} if isinstance(model, PeftModel) else {}
    model.save_pretrained(given.output_dir, **save)
    if isinstance(space, InPlaceSpace) and base:
        save_scales(given.output_dir, space, base)
    return {
        "steps": 0 if last is None else last.step + 1,
        "forward_passes": 0 if last is None else last.forward_passes,
        "output_dir": given.output_dir,
    }


def show(given: ShowArguments) -> dict[str, Any]:
    """Return the `header` and the `records` of a journal; a UserError says that it is damaged."""
    header, records = read(Path(given.journal))
    return {"header": header, "records": [asdict(record) for record in records]}


def show_json(result: dict[str, Any]) -> str:
    """Show the header and each record as a line of JSON."""
    return "\n".join(map(json.dumps, [result["header"], *result["records"]]))
