"""A run rebuilt from its journal, without data or forward passes; and the journal, shown."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from peft import PeftModel
from peft.mapping import get_peft_config
from transformers import PreTrainedModel, set_seed

from zo_peft.core.journal import INITIAL_NAME, Record, read
from zo_peft.core.noise import GENERATOR
from zo_peft.core.tuner import move
from zo_peft.errors import UserError
from zo_peft.models.adapters import add_adapter, prepare
from zo_peft.models.identity import base_hash, identity
from zo_peft.models.in_place_space import InPlaceSpace
from zo_peft.models.loading import load_tokenizer
from zo_peft.models.recipe import check_in_place, load_trained, rule_of, space_of
from zo_peft.runs import jobs
from zo_peft.runs.arguments import ModelArguments
from zo_peft.runs.run import load
from zo_peft.scales import save_scales
from zo_peft.train.checkpoint import load_tensors


@dataclass
class ReplayArguments:
    """What is rebuilt, and where to."""

    journal: str = field(metadata={"help": "The run's zo_journal, beside zo_initial.safetensors."})
    output_dir: str = field(metadata={"help": "Folder for the adapter, the scales or the model."})
    until_step: int | None = field(
        default=None, metadata={"help": "Stop after this many steps. Default: all."}
    )


@dataclass
class ShowArguments:
    """What is shown."""

    action: Literal["show"] = field(metadata={"help": "show: print the journal."})
    journal: str = field(metadata={"help": "A run's zo_journal."})


def replay(model: ModelArguments, given: ReplayArguments) -> dict[str, Any]:
    """Rebuild an adapter (or scales, or weights) from base, starting values and journal.

    Bit for bit on the same kind of device. Of the model's arguments only those of the base count.

    Raises:
        UserError: the journal is damaged or of another base; nothing has been written then.
    """
    path = Path(given.journal)
    header, records = read(path)
    try:
        return _replayed(header, records, path, model, given)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path.name} is not of this version of zo_peft: {error!r}") from error


def _replayed(
    header: dict[str, Any],
    records: Iterator[Record],
    path: Path,
    arguments: ModelArguments,
    given: ReplayArguments,
) -> dict[str, Any]:
    if header["generator"] != GENERATOR:
        raise UserError(f"{path.name} has noise of {header['generator']!r}, not of {GENERATOR!r}")
    name, space_settings = arguments.model_name_or_path, header["space"]
    tune = space_settings["tune"]
    set_seed(header["seed"])
    model: PreTrainedModel | PeftModel = load(arguments, tune, header["num_labels"])
    if header["adapter"] is not None:
        config = {**header["adapter"], "base_model_name_or_path": None}
        model = add_adapter(model, get_peft_config(config))
    prepare(model, load_tokenizer(name, revision=arguments.model_revision))
    if identity(model) != header["base"]:
        raise UserError(
            f"{path.name} is of another base than {name}; give the one that the run started from, "
            "loaded in the same way"
        )
    base = base_hash(model) if tune == "scales" else ""
    check_in_place(model, tune)
    space = space_of(model, **space_settings)
    initial = load_tensors(path.with_name(INITIAL_NAME))
    if initial:
        load_trained(model, space, initial)
    rule, last = rule_of(space, **header["rule"]), None
    for record in records:
        if given.until_step is not None and record.step >= given.until_step:
            break
        move(rule, record)
        last = record
    save = {"save_embedding_layers": False} if isinstance(model, PeftModel) else {}
    model.save_pretrained(given.output_dir, **save)
    if isinstance(space, InPlaceSpace) and base:
        save_scales(given.output_dir, space, base)
    return {
        "steps": 0 if last is None else last.step + 1,
        "forward_passes": 0 if last is None else last.forward_passes,
        "output_dir": given.output_dir,
    }


def replay_text(result: dict[str, Any]) -> str:
    """The result of `replay` in a line."""
    passes = f"{result['forward_passes']:,} forward passes"
    return f"{result['steps']:,} steps ({passes}) replayed into {result['output_dir']}"


def show(given: ShowArguments) -> dict[str, Any]:
    """The header and the records of a journal.

    Raises:
        UserError: it is damaged.
    """
    header, records = read(Path(given.journal))
    return {"header": header, "records": [asdict(record) for record in records]}


def show_text(result: dict[str, Any]) -> str:
    """A table of the records."""
    header = ["step", "loss", "slope", "eps", "learning rate", "forward passes", "seeds", "chosen"]
    rows = [
        [
            str(record["step"]),
            f"{record['loss']:.4f}",
            f"{record['slope']:.4g}",
            f"{record['eps']:.1e}",
            f"{record['learning_rate'] * record['backoff']:.3g}",
            f"{record['forward_passes']:,}",
            str(len(record["direction"]["terms"])),
            json.dumps(record["chosen"]) if record["chosen"] else "",
        ]
        for record in result["records"]
    ]
    return jobs.table(header, rows)


def show_json(result: dict[str, Any]) -> str:
    """The header and each record as a line of JSON."""
    return "\n".join(map(json.dumps, [result["header"], *result["records"]]))
