"""The command line, `zo-peft COMMAND`."""

import argparse
import contextlib
import errno
import json
import os
import reprlib
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, NoReturn

import datasets
import yaml
from transformers import HfArgumentParser

from zo_peft.errors import UserError
from zo_peft.runs import run
from zo_peft.runs.arguments import DataArguments, ModelArguments
from zo_peft.tools import compare, doctor, merge, replay, report, reproduce
from zo_peft.tools import plan as planner
from zo_peft.tools import push as export
from zo_peft.tools.demo import FORWARD_PASSES, LOAD, demo
from zo_peft.train.config import ZOConfig

USAGE = """\
usage: zo-peft COMMAND [options]

  train      tune an adapter, or the base itself, with forward passes only
  plan       whether a run will fit: its memory, from the base's configuration alone
  evaluate   measure an adapter, or a base on a benchmark task
  compare    train with several strategies, gradients among them, side by side
  reproduce  a row of the paper's tables, with its settings, grid and seeds
  replay     rebuild what a run tuned from its journal, without data
  journal    show a journal: `zo-peft journal show out/zo_journal`
  push       publish an adapter, or a tuned model, on the Hub
  merge      put an adapter into the weights of its base
  report     a page of charts of runs: `zo-peft report out`
  doctor     what works on this machine
  demo       tune a LoRA on the embedded model, offline

zo-peft COMMAND --help lists a command's options; --config FILE.yaml gives them in a file."""


@dataclass
class OutputArguments:
    """What a command prints."""

    json: bool = field(
        default=False, metadata={"help": "Print one JSON object on stdout, and nothing else."}
    )


@dataclass
class DemoArguments:
    """The demo's settings."""

    output_dir: str = field(
        default="zo_peft_demo", metadata={"help": "Folder for the base and the adapter."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of data order and noise."})
    strategy: str = field(default="gv", metadata={"help": "How a direction is found."})
    max_forward_passes: int = field(default=FORWARD_PASSES, metadata={"help": "The budget."})


def _train_text(metrics: dict[str, Any]) -> str:
    lines = []
    if metrics["metric_after"] is not None:
        name = metrics["metric_name"]
        lines = [
            f"{name:20}{metrics['metric_before']:.4f} -> {metrics['metric_after']:.4f}",
            f"{'evaluation loss':20}{metrics['eval_loss_before']:.4f} -> "
            f"{metrics['eval_loss_after']:.4f}",
        ]
    spent = f"{metrics['forward_passes']:,} in {metrics['steps']:,} steps of {metrics['strategy']}"
    return "\n".join(
        [
            *lines,
            f"{'forward passes':20}{spent}",
            f"{'peak memory':20}{metrics['peak_memory_bytes'] / 2**20:,.0f} MiB",
            f"{'time':20}{metrics['wall_seconds']:.0f} s",
        ]
    )


def _demo_text(result: dict[str, Any]) -> str:
    saved = f"The base is in {result['base']}, the adapter in {result['adapter']}."
    return (
        f"{_train_text(result)}\n\n{saved} To load them with plain PEFT:\n\n{LOAD.format(**result)}"
    )


def _evaluate_text(result: dict[str, Any]) -> str:
    examples = f"on {result['examples']:,} examples"
    return (
        f"{result['metric_name']} {result['metric']:.4f}, loss {result['eval_loss']:.4f} {examples}"
    )


def _demo(args: DemoArguments) -> dict[str, Any]:
    return demo(**vars(args))


@dataclass(frozen=True)
class Command:
    """A command: what it does, with which arguments, and its result as text.

    Attributes:
        trains: further arguments are options of `train`, which the job takes as a list.
        positional: names of arguments that may come first without their names.
        json: the result as JSON.
    """

    job: Callable[..., dict[str, Any]]
    arguments: tuple[type, ...]
    text: Callable[[dict[str, Any]], str]
    trains: bool = False
    positional: tuple[str, ...] = ()
    json: Callable[[dict[str, Any]], str] = json.dumps


RUN = (ModelArguments, DataArguments, ZOConfig)

COMMANDS = {
    "train": Command(run.train, RUN, _train_text),
    "plan": Command(planner.plan, (planner.PlanArguments, *RUN), planner.text),
    "evaluate": Command(run.evaluate, RUN, _evaluate_text),
    "compare": Command(compare.compare, (compare.CompareArguments,), compare.text, True),
    "reproduce": Command(
        reproduce.reproduce, (reproduce.ReproduceArguments,), reproduce.text, True
    ),
    "replay": Command(
        replay.replay,
        (ModelArguments, replay.ReplayArguments),
        replay.replay_text,
        positional=("journal",),
    ),
    "journal": Command(
        replay.show,
        (replay.ShowArguments,),
        replay.show_text,
        positional=("action", "journal"),
        json=replay.show_json,
    ),
    "push": Command(
        export.push, (export.PushArguments,), export.push_text, positional=("folder", "repo_id")
    ),
    "merge": Command(merge.merge, (ModelArguments, merge.MergeArguments), merge.merge_text),
    "report": Command(
        report.report, (report.ReportArguments,), report.report_text, positional=("runs",)
    ),
    "doctor": Command(doctor.doctor, (), doctor.doctor_text),
    "demo": Command(_demo, (DemoArguments,), _demo_text),
}


#: How a command goes on that was stopped.
GOES_ON = {
    "train": "; to go on, give the same command with --resume_from_checkpoint True",
    "compare": "; to go on, give the same command again",
    "reproduce": "; to go on, give the same command again",
}

#: Errors of a disk that is full or may not be written.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for a mistake of the user's, 130 if stopped."""
    name, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    if name not in COMMANDS:
        known = name in ("-h", "--help")
        print(USAGE, file=sys.stdout if known else sys.stderr)
        return 0 if known else 2
    command = COMMANDS[name]
    before = signal.signal(signal.SIGTERM, _interrupt)
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        output, arguments = parse(name, command, rest)
        # Trainer prints its logs on stdout; there only the result belongs.
        with contextlib.redirect_stdout(sys.stderr):
            result = command.job(*arguments)
    except UserError as error:
        print(f"zo-peft: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        where = Path(error.filename).name if error.filename else "the output folder"
        message = f"{where} cannot be written: {error.strerror}"
        print(f"zo-peft: error: {message}{GOES_ON.get(name, '')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"zo-peft: stopped{GOES_ON.get(name, '')}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    # Of several processes, one speaks.
    if os.environ.get("RANK", "0") == "0":
        print(command.json(result) if output.json else command.text(result))
    return 0


def _interrupt(signum: int, frame: Any) -> NoReturn:
    """SIGTERM, by which machines are taken away, ends a command as Ctrl-C does."""
    raise KeyboardInterrupt


#: PyYAML's own scanner takes seconds for a thousand nested brackets, libyaml's does not.
YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
LONGEST_CONFIG = 1 << 14


class _Parser(HfArgumentParser):
    """Errors in one line, without the list of all options."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def parse(name: str, command: Command, argv: Sequence[str]) -> tuple[OutputArguments, list[Any]]:
    """The arguments of a command, from the command line over a `--config` file."""
    for index, argument in enumerate(command.positional):
        if len(argv) > 2 * index and not argv[2 * index].startswith("-"):
            argv = [*argv[: 2 * index], f"--{argument}", *argv[2 * index :]]
    parser = _Parser(
        (OutputArguments, *command.arguments),
        prog=f"zo-peft {name}",
        epilog=_epilog(command),
        allow_abbrev=False,
    )
    rest = argv if command.trains else _with_file(parser, argv)
    parsed = parser.parse_args_into_dataclasses(
        rest, return_remaining_strings=True, look_for_args_file=False
    )
    *parsed, unknown = (part for part in parsed if not isinstance(part, argparse.Namespace))
    output, *arguments = parsed
    if command.trains:
        return output, [*arguments, unknown]
    if unknown:
        raise UserError(f"unknown argument {unknown[0]}; see zo-peft {name} --help")
    return output, arguments


def _epilog(command: Command) -> str | None:
    if command.trains:
        return "Further options: those of zo-peft train."
    names = " ".join(command.positional)
    return f"May come first, without names: {names}." if names else None


def _with_file(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """The options of a `--config` file, then those of the command line, which override them."""
    file_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    file_parser.add_argument("--config")
    given, rest = file_parser.parse_known_args(argv)
    actions = {action.dest: action for action in reversed(parser._actions)}
    parser.add_argument("--config", help="YAML file of options; the command line overrides it.")
    options = {} if given.config is None else _read_options(given.config)
    words: list[str] = []
    for option, value in options.items():
        if option not in actions or option == "help":
            raise UserError(f"--config {given.config} has an unknown option {option!r}")
        words += _words(f"--{option}", value, actions[option])
    return words + rest


def _read_options(path: str) -> dict[Any, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
        options = yaml.load(text, YAML) if len(text) <= LONGEST_CONFIG else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"--config {path} cannot be read as YAML: {first}") from None
    if len(text) > LONGEST_CONFIG:
        raise UserError(
            f"--config {path} has over {LONGEST_CONFIG:,} characters; give options alone"
        )
    if not isinstance(options, dict):
        raise UserError(f"--config {path} must hold options, one `name: value` a line")
    return options


#: What one word of a command line can say.
SCALARS = (str, bool, int, float, date)


def _words(flag: str, value: Any, action: argparse.Action) -> list[str]:
    """An option of a file as on a command line, where argparse checks it."""
    if value is None and action.default is None and not action.required:
        return []
    if isinstance(value, SCALARS):
        return [f"{flag}={value}"]
    several = isinstance(value, list) and (len(value) == 1 or (value and action.nargs == "+"))
    if several and all(map(_is_word, value)):
        return [flag, *map(str, value)]
    if isinstance(value, dict):
        with contextlib.suppress(TypeError, ValueError, RecursionError):
            return [f"{flag}={json.dumps(value)}"]
    name = flag.removeprefix("--")
    raise UserError(f"{name}: {reprlib.repr(value)} is no value of an option; drop it, or give one")


def _is_word(item: Any) -> bool:
    """Whether it can be told from an option."""
    return isinstance(item, SCALARS) and not (isinstance(item, str) and item.startswith("-"))
