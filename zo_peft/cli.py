"""The command line, `zo-peft COMMAND`.

A command's module is imported when the command runs, so that help and a mistyped command cost
no seconds: torch and transformers are not loaded for them.
"""

import contextlib
import errno
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import yaml

from zo_peft import __version__
from zo_peft.errors import Notice, UserError
from zo_peft.runs.help import guess, read_by, screen


@dataclass(frozen=True)
class Command:
    """A command of `commands.yaml`, which says what its keys mean.

    What it prints is a template of `runs/texts/`, which has its name.
    """

    help: str
    job: str
    arguments: Sequence[str] = ()
    reads: Sequence[str] = ()
    trains: bool = False
    positional: Sequence[str] = ()
    json: str | None = None
    defaults: str | None = None
    goes_on: str = ""
    groups: Sequence[str] = ()
    example: str = ""
    meanings: dict[str, str] = field(default_factory=dict)


TABLE = yaml.safe_load(Path(__file__).with_name("commands.yaml").read_bytes())
COMMANDS = {name: Command(**entries) for name, entries in TABLE.items()}
RUN = COMMANDS["train"].arguments

#: Errors of a disk that is full or may not be written.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)

#: Packages that few commands need, so that they are imported there.
OPTIONAL = ("bitsandbytes", "datasets", "matplotlib", "pandas", "pyarrow")


def usage() -> str:
    """All commands, a line each."""
    lines = [f"  {name:10} {command.help}" for name, command in COMMANDS.items()]
    end = "zo-peft COMMAND --help shows a command's options, and --version the version."
    return "\n".join(["usage: zo-peft COMMAND [options]", "", *lines, "", end])


def help_of(name: str, command: Command) -> str:
    """What a command does, an example of it, and its options on one screen."""
    words = " ".join([name, *(f"[{word.upper()}]" for word in command.positional), "[options]"])
    parts = [f"usage: zo-peft {words}\n{name}: {command.help}"]
    if command.example:
        parts.append("\n".join(f"  {line}" for line in command.example.splitlines()))
    more = "Options of zo-peft train" if command.trains else "--config FILE: options in YAML"
    end = f"{more}. --help-all: every option at length.\n"
    end += "--json: print one JSON object. --debug: tracebacks, and what libraries say."
    reads = read_by(command.reads)
    shown = screen(command.arguments, command.groups, reads, command.meanings)
    return "\n\n".join([*parts, shown, end])


def named(name: str) -> Any:
    """What a command names as `module:name`."""
    return resolve_name(f"zo_peft.{name}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for a mistake of the user's, 130 if stopped."""
    name, *rest = words = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    if "--version" in words:
        print(f"zo-peft {__version__}")
        return 0
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        known = f"{guess(name, COMMANDS)}; zo-peft --help lists all commands"
        print(f"zo-peft: error: there is no command {name!r}{known}", file=sys.stderr)
        return 2
    command = COMMANDS[name]
    if {"-h", "--help"} & {*rest}:
        print(help_of(name, command))
        return 0
    debug = _take_debug(rest)
    # SIGTERM, by which machines are taken away, ends a command as Ctrl-C does.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with contextlib.nullcontext() if debug else _quiet():
            as_json, result = _run(name, command, rest)
        # Of several processes, one speaks.
        if os.environ.get("RANK", "0") == "0":
            as_text = named(command.json) if command.json else json.dumps
            print(as_text(result) if as_json else named("runs.texts:text")(name, result))
    except Exception as error:
        if debug and not isinstance(error, UserError):
            raise
        print(f"zo-peft: error: {_line(error, command)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"zo-peft: stopped{command.goes_on}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within the context, other libraries print errors alone; a notice of ours is a line."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    with contextlib.suppress(ImportError):
        import datasets

        datasets.disable_progress_bars()
    if sys.stderr.isatty():
        # Downloads and loading take long, and in a terminal a bar does no harm.
        enable_progress_bars()
    else:
        disable_progress_bar()
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", Notice)
        warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)
        try:
            yield
        finally:
            logging.disable(before)


def _take_debug(argv: list[str]) -> bool:
    """Take `--debug` out of the options. (With a value it is an option of transformers.)"""
    for index, word in enumerate(argv):
        if word == "--debug" and (argv[index + 1 :] or ["-"])[0].startswith("-"):
            del argv[index]
            return True
    return False


def _line(error: Exception, command: Command) -> str:
    """What went wrong, in one line."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        where = Path(error.filename).name if error.filename else "the output folder"
        return f"{where} cannot be written: {error.strerror}{command.goes_on}"
    if isinstance(error, ModuleNotFoundError) and error.name in OPTIONAL:
        return f'this needs the package {error.name}; pip install "zo_peft[all]" brings it'
    return f"{type(error).__name__}: {' '.join(str(error).split())} (--debug shows where)"


def _run(name: str, command: Command, argv: Sequence[str]) -> tuple[bool, dict[str, Any]]:
    """Whether JSON is asked for, and the result."""
    from zo_peft.runs.options import parse

    arguments = [named(argument) for argument in command.arguments]
    defaults = named(command.defaults) if command.defaults else None
    trains = [*map(named, RUN)] if command.trains else []
    reads = read_by(command.reads)
    output, parsed = parse(name, arguments, argv, command.positional, trains, defaults, reads)
    # Trainer prints its logs on stdout, where only the result belongs.
    with contextlib.redirect_stdout(sys.stderr):
        return output.json, named(command.job)(*parsed)
