"""Mutated journals, configurations and data files: each is read, or refused with a `UserError`.

Anything else is a finding: another exception, an input that takes more than a second, a file that
is opened for writing outside the scratch folder, a process, a connection, or a pickle. Findings are
printed with their input, and the exit code is 1 if there is any.

    python scripts/fuzz.py --inputs 100000
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from zo_peft import Direction, UserError
from zo_peft.cli import RUN as NAMES
from zo_peft.cli import named
from zo_peft.core.journal import MAGIC, Record, framed, read
from zo_peft.data import make_examples, read_rows
from zo_peft.runs.options import parse

CONFIG = b"""model_name_or_path: facebook/opt-125m
train_file: train.tsv
label_words: "terrible,great"
lora_target_modules: [q_proj, v_proj]
learning_rate: 1e-3
num_candidates: 8
max_forward_passes: 2000
per_device_train_batch_size: 16
load_in_8bit: true
strategy: gv
zo_eps: null
output_dir: out
"""
DATA = {
    ".jsonl": b'{"text": "a fine film", "label": 1, "n": [1.5]}\n{"text": "dull", "label": 0}\n',
    ".csv": b'text,label\n"a fine, warm film",1\ndull,0\n',
    ".tsv": b'text\tlabel\na fine "film"\t1\ndull\t0\n',
}
#: What mutations insert.
PIECES = [b"", b"\0", b"\xff", b"\n", b"{", b"}", b"[", b"]", b'"', b":", b"- ", b"&a", b"*a"]
PIECES += [b"!!", b"null", b"true", b"nan", b"1e999", b"-1", b"../../etc/x", b"9" * 40]
PIECES += [b"[" * 2000, b"!!python/object/apply:os.system [id]", b"\xf0\x9f\x98\x80", b",", b"\t"]
PIECES += [b"%s", b"'"]
FORBIDDEN = ("subprocess.Popen", "os.system", "socket.connect", "pickle.find_class")


class Hang(Exception):
    """An input that takes more than a second."""


def mutated(content: bytes, random_: random.Random) -> bytes:
    """The content with one to six random changes."""
    data = bytearray(content)
    for _ in range(random_.randint(1, 6)):
        place = random_.randrange(len(data) + 1)
        stop = min(len(data), place + random_.choice((0, 1, 1, 4, 40)))
        kind = random_.randrange(4)
        if kind == 0:
            data[place:stop] = random_.choice(PIECES)
        elif kind == 1:
            data[place:stop] = random_.randbytes(stop - place)
        elif kind == 2:
            data[place:place] = data[place:stop] * random_.randint(1, 3)
        elif place < len(data):
            data[place] ^= 1 << random_.randrange(8)
    return bytes(data)


#: Options of `zo-peft train`, and what a YAML file may say of one.
RUN = [*map(named, NAMES)]
OPTIONS = [f.name for arguments in RUN for f in fields(arguments) if f.init]
VALUES = (
    b"null;true;word;'';-1;0;1.5;1e400;.nan;.inf;0x10;9999999999999999999;2020-01-01;!!binary aGk=;"
    b"[];[1, 2];[null];[[x]];&a [*a];{a: 1};{1: [2]};!!set {a};'{\"a\": 1}'"
).split(b";")


def mutated_config(content: bytes, random_: random.Random) -> bytes:
    """A changed configuration; half of them are well-formed, with one to three more options."""
    if random_.random() < 0.5:
        return mutated(content, random_)
    for option in random_.sample(OPTIONS, random_.randint(1, 3)):
        content += option.encode() + b": " + random_.choice(VALUES) + b"\n"
    return content


HEADER = b'{"space": {"tune": "adapter"}}'


def records() -> list[bytes]:
    """The contents of a journal's frames behind its header."""
    direction = Direction(((3, 0.5), (9, -0.5)))
    made = [Record(n, 0.1, 1.0, 0.2, 0.3, 0.4, 0.5, 0.01, 4, 64, direction) for n in range(2)]
    chosen = Record(2, 0.1, 1.0, 0.2, 0.3, 0.4, 0.5, 0.01, 4, 64, direction, 3, 0, {"skipped": ""})
    return [record.pack() for record in (*made, chosen)]


def mutated_journal(content: bytes, random_: random.Random) -> bytes:
    """A changed journal; half of them have right checksums, so that their frames are read."""
    if random_.random() < 0.5:
        return mutated(content, random_)
    frames = [HEADER, *records()]
    place = random_.randrange(len(frames))
    frames[place] = mutated(frames[place], random_)
    return MAGIC + b"".join(map(framed, frames))


MUTATIONS = {"journal": mutated_journal, "config": mutated_config}


def read_journal(path: Path) -> None:
    """Read a journal to its end."""
    for _ in read(path)[1]:
        pass


def read_config(path: Path) -> None:
    """Read a configuration as `zo-peft train --config` does."""
    parse("train", RUN, ["--config", str(path)])


def read_data(path: Path) -> None:
    """Read training data, with a template and label words and without them."""
    make_examples(read_rows(path), path.name, "{text} It was", label_words=["terrible", "great"])
    make_examples(read_rows(path), path.name)


Parser = Callable[[Path], None]


def fuzz(
    name: str, parser: Parser, seeds: dict[str, bytes], folder: Path, inputs: int, seed: int
) -> list[str]:
    """Give a parser so many mutated inputs; its findings, one input for each kind of error."""
    random_, outcomes, found = random.Random(seed), Counter[str](), dict[str, bytes]()
    start = time.monotonic()
    for number in range(inputs):
        suffix, content = list(seeds.items())[number % len(seeds)]
        data = MUTATIONS.get(name, mutated)(content, random_)
        path = folder / f"input{suffix}"
        path.write_bytes(data)
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        try:
            parser(path)
            outcomes["read"] += 1
        except UserError:
            outcomes["refused"] += 1
        except Exception as error:
            outcomes["findings"] += 1
            found.setdefault(f"{type(error).__name__}: {str(error)[:80]}", data)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    counts = ", ".join(f"{count:,} {outcome}" for outcome, count in outcomes.items())
    print(f"{name}: {inputs:,} inputs in {time.monotonic() - start:.0f} s: {counts}", flush=True)
    return [f"{name}: {error}\n    {data!r}" for error, data in found.items()]


def _guard(folder: Path) -> None:
    """Have everything that no parser may do raise an error."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FORBIDDEN:
            raise PermissionError(event)
        if event == "open":
            path, _, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and isinstance(path, str) and not Path(path).is_relative_to(folder):
                raise PermissionError(f"{path} is opened for writing")

    def late(*_: Any) -> None:
        raise Hang("more than a second")

    signal.signal(signal.SIGALRM, late)
    sys.addaudithook(hook)


def main() -> int:
    """Print how inputs were taken; returns 1 if there is a finding."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", type=int, default=100_000, help="for each parser")
    parser.add_argument("--parsers", nargs="*", default=["journal", "config", "data"])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        parsers: dict[str, tuple[Parser, dict[str, bytes]]] = {
            "journal": (read_journal, {"": MAGIC + b"".join(map(framed, [HEADER, *records()]))}),
            "config": (read_config, {".yaml": CONFIG}),
            "data": (read_data, DATA),
        }
        _guard(folder)
        findings = []
        for name in given.parsers:
            read_one, seeds = parsers[name]
            findings += fuzz(name, read_one, seeds, folder, given.inputs, given.seed)
        print("\n".join(findings) or "no findings")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
