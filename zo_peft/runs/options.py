"""The options of a command, from the command line and from a configuration file."""

import argparse
import contextlib
import json
import re
import reprlib
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from zo_peft.errors import UserError, explained
from zo_peft.runs.help import guess
from zo_peft.train.checks import REFUSED

#: The types that one word of a command line can express.
SCALARS = (str, bool, int, float, date)


@dataclass
class OutputArguments:
    """What a command prints."""

    json: bool = HfArg(default=False, help="Print one JSON object on stdout, and nothing else.")


class _Words(argparse.ArgumentParser):
    """Reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        # Each option also has a spelling with dashes, which says nothing more.
        message = re.sub(r"(--\w+)/--[\w-]+", r"\1", message)
        raise UserError(f"{message}; see {self.prog} --help")


class _Parser(HfArgumentParser, _Words):
    """Takes choices in either case, and hides what is refused or not read."""

    def __init__(self, name: str, arguments: Sequence[type], reads: Collection[str] = ()) -> None:
        kinds: Any = (OutputArguments, *arguments)
        told: Any = {"prog": f"zo-peft {name}", "usage": "%(prog)s [options]"}
        super().__init__(kinds, **told, allow_abbrev=False, add_help=False)
        # `-1=bad` is a value, as -1 is.
        self._negative_number_matcher = re.compile(r"-\d")
        self.add_argument("--help-all", "--help_all", action="help", help="Show this.")
        names = {action.dest for action in self._actions}
        self.unread = names - {*reads, "json", "help_all"} if reads else set[str]()
        refused = {n for n in names if any(n == r or n.startswith(f"{r}_") for r in REFUSED)}
        for action in self._actions:
            if action.choices is not None:
                named = {str(choice).lower(): choice for choice in action.choices}
                action.type = lambda text, named=named: named.get(text.lower(), text)
            if action.dest in self.unread | refused:
                action.help = argparse.SUPPRESS

    def refuse_unknown(self, words: Iterable[str], more: Iterable[str] = ()) -> None:
        """Refuse the first word that is no option, or one of `more`; say which may be meant."""
        own = self._option_string_actions.items()
        known = {"--config", *more, *(n for n, action in own if action.dest not in self.unread)}
        for word in words:
            if word.partition("=")[0] not in known:
                meant = guess(word, (name.lstrip("-") for name in known))
                self.error(f"unknown argument {word}{meant}")


def parse(
    name: str,
    arguments: Sequence[type],
    argv: Sequence[str],
    positional: Sequence[str] = (),
    trains: Sequence[type] = (),
    defaults: Callable[[Sequence[str]], dict[str, Any]] | None = None,
    reads: Collection[str] = (),
) -> tuple[OutputArguments, list[Any]]:
    """The arguments of a command, or a UserError. The command line overrides a `--config` file.

    Args:
        arguments: the command's dataclasses.
        positional: names of arguments that may come first without their names.
        trains: the dataclasses of `zo-peft train`. All other options are of these, and are returned
            last, as a list of words.
        defaults: takes the options that are given, and returns those of a run, which count where
            none is given. A line on stderr says where others are given.
        reads: the only options that the command takes; empty: all. Others in a `--config` file,
            which may be that of a run, are left out, which a line on stderr says.
    """
    for index, argument in enumerate(positional):
        if len(argv) > 2 * index and not argv[2 * index].startswith("-"):
            argv = [*argv[: 2 * index], f"--{argument}", *argv[2 * index :]]
    parser = _Parser(name, arguments, reads)
    of_train = _Parser("train", trains)._option_string_actions if trains else {}
    # As for argparse, what has a space is a value.
    parser.refuse_unknown((w for w in argv if re.match(r"--[^\s=]*(=|$)", w)), of_train)
    argv = _with_file(parser, argv, of_train)
    found = {} if defaults is None else defaults(argv)
    actions = {action.dest: action for action in parser._actions}
    before = [_words(name, v, actions[name]) for name, v in found.items() if v is not None]
    output, *filled, unknown = parser.parse_args_into_dataclasses(
        [*chain(*before), *argv], return_remaining_strings=True, look_for_args_file=False
    )
    now = {name: value for part in filled for name, value in vars(part).items()}
    was = {name: parser.get_default(name) if v is None else v for name, v in found.items()}
    if other := [f"{n} is {now[n]!r} (was {v!r})" for n, v in was.items() if now[n] != v]:
        print(f"unlike the run: {'; '.join(other)}", file=sys.stderr)
    if trains:
        return output, [*filled, unknown]
    parser.refuse_unknown(unknown)
    return output, filled


def _with_file(parser: _Parser, argv: Sequence[str], more: dict[str, argparse.Action]) -> list[str]:
    """The options of a `--config` file, then those of the command line, which override them."""
    file_parser = _Words(parser.prog, add_help=False, allow_abbrev=False)
    file_parser.add_argument("--config")
    given, rest = file_parser.parse_known_args(argv)
    actions = {action.dest: action for action in (*more.values(), *reversed(parser._actions))}
    # Only for --help: the option has been taken out of the command line.
    parser.add_argument(
        "--config",
        default=argparse.SUPPRESS,
        help="YAML file of options; the command line overrides it.",
    )
    options: dict[Any, Any] = {}
    if path := given.config:
        errors = OSError, ValueError, yaml.YAMLError
        with explained(f"--config {path} cannot be read as YAML", *errors):
            options = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        if not isinstance(options, dict):
            raise UserError(f"--config {path} must hold options, one `name: value` a line")
    words: list[str] = []
    own = {action.dest for action in parser._actions}
    # argparse takes what it does not know and has a space for one more value of a list before it.
    for option, value in sorted(options.items(), key=lambda given: given[0] in own):
        if option not in actions or option == "help_all":
            meant = guess(str(option), actions)
            raise UserError(f"--config {path} has an unknown option {option!r}{meant}")
        if option not in parser.unread:
            words += _words(option, value, actions[option])
    if idle := [name for name in options if name in parser.unread]:
        listed = ", ".join(idle)
        print(f"{parser.prog} uses none of these in {path}: {listed}", file=sys.stderr)
    return words + rest


def _words(name: str, value: Any, action: argparse.Action) -> list[str]:
    """An option of a file as words of a command line, which argparse then checks."""
    if value is None and action.default is None and not action.required:
        return []
    if isinstance(value, SCALARS):
        return [f"--{name}={value}"]
    if isinstance(value, dict):
        with contextlib.suppress(TypeError, ValueError):
            return [f"--{name}={json.dumps(value)}"]
    if isinstance(value, list) and (len(value) == 1 or (value and action.nargs == "+")):
        texts = [item for item in value if isinstance(item, str)]
        # On a command line, a text that begins with a dash would be another option.
        if all(isinstance(v, SCALARS) for v in value) and not any(t[:1] == "-" for t in texts):
            return [f"--{name}", *map(str, value)]
    raise UserError(f"{name}: {reprlib.repr(value)} is no value of an option; drop it, or give one")
