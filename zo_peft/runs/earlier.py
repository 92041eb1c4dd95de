"""What a command takes from the run of which it uses the adapter, so that nobody types it again."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zo_peft.data.tasks import TASKS
from zo_peft.errors import UserError
from zo_peft.models.adapters import saved_adapter
from zo_peft.models.hub import public_name
from zo_peft.runs.help import SETS
from zo_peft.train.results import read_results

#: The file of a run that says where a base and its tokenizer are. It never goes to the Hub.
BASE_NAME = "zo_base.txt"


def options_of_run(words: Sequence[str]) -> dict[str, Any]:
    """Options of an earlier run, None where it had none; a command line that gives them counts.

    The run is the one that made the adapter or, without an adapter, the model. A line on stderr
    says where an adapter does not tell of its run. A UserError says that what it tells is damaged.

    Args:
        words: the command line and the options of its configuration file.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    read = "adapter_name_or_path model_name_or_path task eval_file dataset_name prompt_template"
    for name in read.split():
        finder.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="?")
    given, _ = finder.parse_known_args(words)
    adapter, base = given.adapter_name_or_path, given.model_name_or_path
    if adapter is not None and Path(adapter).is_file():
        raise UserError(f"{adapter} is a file; give the folder of a run first, and then {adapter}")
    told = read_results(adapter or base).get("settings", {}) if adapter or base else {}
    if adapter is not None and told.get("tune") != "scales" and _is_model(Path(adapter)):
        cure = "give it by --model_name_or_path, and rows by --eval_file"
        raise UserError(f"{adapter} holds a whole model, no adapter; {cure}")
    names = [*SETS["told of rows"], *(SETS["told of the base"] if adapter else ())]
    if given.task is None:
        own = given.eval_file or given.dataset_name or "task" not in told
        names += SETS["told of own rows" if own else "told of a task"]
        if own and told.get("task") in TASKS and given.prompt_template is None:
            name, prompt = told["task"], TASKS[told["task"]].prompt
            print(f"the run was of {name}, with prompts such as {prompt!r}", file=sys.stderr)
    found = {name: told.get(name) for name in names} if told else {}
    if adapter is None:
        return found
    if not told:
        why = f"{public_name(adapter)} has no zo_metrics.json of a run with zo_peft, so nothing"
        print(f"{why} is known of its prompts or words; options give them", file=sys.stderr)
    noted = Path(adapter) / BASE_NAME
    known = [*(noted.read_text().splitlines() if noted.is_file() else ()), None, None]
    own_base = known[0] or told.get("model_name_or_path")
    own_base = own_base or saved_adapter(adapter)[0].base_model_name_or_path
    is_own = base is not None and public_name(base) == public_name(own_base)
    if not is_own:
        found["model_name_or_path"] = own_base
    if is_own or base is None:
        tokenizer = known[1] or told.get("tokenizer_name")
        found |= {"engine": told.get("engine"), "tokenizer_name": tokenizer}
    return found


def base_of_run(words: Sequence[str]) -> dict[str, Any]:
    """The base of an earlier run alone, as it was before it was quantized."""
    found = options_of_run(words)
    return {n: found[n] for n in ("model_name_or_path", "model_revision") if n in found}


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()


def note_base(folder: str, *names: str) -> None:
    """Write down where a base and its tokenizer are, if they are here, in the folder of a run."""
    paths = [Path(name) for name in names]
    if any(path.exists() for path in paths):
        lines = [f"{p.absolute() if p.exists() else p}\n" for p in paths]
        (Path(folder) / BASE_NAME).write_text("".join(lines))
