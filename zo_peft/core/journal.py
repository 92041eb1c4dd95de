"""The journal of a run: every update as seeds and numbers, from which the run can be rebuilt.

A file of frames: the magic line, a header as JSON, then one record a step. A frame is its length,
the CRC-32 of its content, and that of these two numbers, so that a frame that ends too early (torn:
the process or the disk stopped) is told from one that was changed. Numbers are little-endian.
"""

import json
import math
import os
import shutil
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from io import FileIO
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, Literal
from zlib import crc32

from zo_peft.core.direction import Direction
from zo_peft.core.strategies import Estimate
from zo_peft.errors import UserError, explained

JOURNAL_NAME, INITIAL_NAME = "zo_journal", "zo_initial.safetensors"
MAGIC = b"zo_peft journal 1\n"

_FRAME = struct.Struct("<III")
_NUMBERS = struct.Struct("<Q7dQQQQII")
_NO_SEED = 2**64 - 1

DAMAGED = "use an undamaged copy, or start a new run"

#: Bytes of the longest frame that is read: a header, or a record of about a million seeds.
LONGEST = 1 << 24


@dataclass(frozen=True)
class Record:
    """An update: what the update rule was given, and what had been spent.

    Attributes:
        step: of the run, from 0.
        learning_rate, backoff: of the update rule at this step.
        slope, spread, sensitivity, direction, elite: of the step's `Estimate`.
        loss: the mean of its finite losses; infinite where there was none.
        eps, basis_seed: what it was measured with; the seed is that of low-rank noise.
        forward_passes, examples_forwarded: of the run so far.
        chosen: what was chosen automatically since the last record; how many losses were not
            finite (`non_finite`); why the update was skipped (`skipped`).
    """

    step: int
    learning_rate: float
    backoff: float
    slope: float
    spread: float
    sensitivity: float
    loss: float
    eps: float
    forward_passes: int
    examples_forwarded: int
    direction: Direction
    elite: int | None = None
    basis_seed: int = 0
    chosen: dict[str, Any] = field(default_factory=dict)

    @property
    def skipped(self) -> str | None:
        """Why the update was skipped; None where it was made."""
        return self.chosen.get("skipped")

    @property
    def estimate(self) -> Estimate:
        """What the step found; of its losses a record has the mean alone."""
        own = (self.loss,), self.elite, self.spread, self.sensitivity
        return Estimate(self.direction, self.slope, *own)

    @property
    def checksum(self) -> int:
        """By which a checkpoint knows the journal that it belongs to."""
        return crc32(self.pack())

    def pack(self) -> bytes:
        """104 bytes, 16 for each seed, and what was chosen as JSON."""
        terms, chosen = self.direction.terms, json.dumps(self.chosen) if self.chosen else ""
        seeds, weights = zip(*terms) if terms else ((), ())
        elite = _NO_SEED if self.elite is None else self.elite
        own = (getattr(self, name) for name in _FIELDS)
        numbers = _NUMBERS.pack(*own, elite, self.basis_seed, len(terms), len(chosen))
        packed = struct.pack(f"<{len(terms)}Q{len(terms)}d", *seeds, *weights)
        return numbers + packed + chosen.encode()

    @classmethod
    def unpack(cls, content: bytes) -> "Record":
        """The inverse of `pack`; a ValueError if this is no record, or a number is not finite."""
        if len(content) < _NUMBERS.size:
            raise ValueError("it is too short")
        *numbers, elite, basis_seed, count, length = _NUMBERS.unpack_from(content)
        if len(content) != _NUMBERS.size + 16 * count + length:
            raise ValueError("its length is not what it says")
        terms = struct.unpack_from(f"<{count}Q{count}d", content, _NUMBERS.size)
        first = dict(zip(_FIELDS, numbers))
        wanted = (value for name, value in first.items() if name != "loss")
        if math.isnan(first["loss"]) or not all(map(math.isfinite, (*wanted, *terms[count:]))):
            raise ValueError("a number in it is not finite")
        chosen = json.loads(content[len(content) - length :]) if length else {}
        if not isinstance(chosen, dict):
            raise ValueError("what was chosen is no JSON object")
        return cls(
            **first,
            direction=Direction(tuple(zip(terms[:count], terms[count:]))),
            elite=None if elite == _NO_SEED else elite,
            basis_seed=basis_seed,
            chosen=chosen,
        )


#: The numbers that come first in a packed record, in their order.
_FIELDS = tuple(f.name for f in fields(Record))[:10]


class Follower:
    """The journal of a process that writes none: the steps behind it, which it goes on from."""

    def __init__(self, past: Iterable[Record] = ()) -> None:
        self._past = {record.step: record for record in past}

    def past(self, step: int) -> Record | None:
        """The record of that step, if the journal has it."""
        return self._past.get(step)

    def append(self, record: Record) -> None:
        """Do nothing: another process writes the records."""

    def sync(self) -> None:
        """Do nothing."""

    close = sync


class Journal(Follower):
    """A journal that is being written; one that is there is kept as `<name>.old`."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        super().__init__()
        if path.exists():
            path.replace(path.with_name(path.name + ".old"))
        self._open(path, "xb", 0)
        self._write(MAGIC + framed(json.dumps(header).encode()))

    @classmethod
    def resumed(cls, source: Path, path: Path, keep: int | None = None) -> "Journal":
        """Go on with a journal, copied where `path` is another one; a torn last record is cut off.

        With `keep`, go on behind so many records; `<name>.old` keeps the others. A UserError says
        that it cannot be read, is damaged before its end, or has too few records.
        """
        _, start, found = _opened(source)
        records = list(found)
        if len(records) < (keep or 0):
            what = f"{source.name} has {len(records)} records"
            raise UserError(f"{what}, but the checkpoint is of step {keep}")
        if source != path:
            shutil.copyfile(source, path)
        elif keep is not None and len(records) > keep:
            shutil.copyfile(path, path.with_name(path.name + ".old"))
        kept = records[:keep]
        journal = cls.__new__(cls)
        Follower.__init__(journal, (record for record, _ in kept))
        journal._open(path, "r+b", kept[-1][1] if kept else start)
        return journal

    def append(self, record: Record) -> None:
        """Write a record; once this returns, the process may die without losing it.

        A UserError says that the disk is full or fails; the journal is as it was.
        """
        self._write(framed(record.pack()))

    def sync(self) -> None:
        """Wait until all is on the disk itself."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _open(self, path: Path, mode: Literal["xb", "r+b"], end: int) -> None:
        self.path, self._end = path, end
        self._file: FileIO = path.open(mode, buffering=0)
        self._file.truncate(end)
        self._file.seek(end)

    def _write(self, content: bytes) -> None:
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._file.truncate(self._end)
            self._file.seek(self._end)
            why = f"{self.path.name} cannot be written: {error.strerror}. Earlier steps are safe"
            advice = "make room and go on with --resume_from_checkpoint True"
            raise UserError(f"{why}; {advice}") from error
        self._end += len(content)


def framed(content: bytes) -> bytes:
    """A frame around the content of a header or a record."""
    start = struct.pack("<II", len(content), crc32(content))
    return start + struct.pack("<I", crc32(start)) + content


def read(path: Path) -> tuple[dict[str, Any], Iterator[Record]]:
    """The header and the records of a journal, in order; a torn record at its end is left out.

    A UserError says that it is missing, no journal, or damaged, and the number of the record.
    """
    header, _, records = _opened(path)
    return header, (record for record, _ in records)


def _opened(path: Path) -> tuple[dict[str, Any], int, Iterator[tuple[Record, int]]]:
    """The header and where it ends, and each record and where it ends, in bytes."""
    with explained(f"{path} cannot be read", OSError, advice=f"give a run's {JOURNAL_NAME}"):
        file = path.open("rb")
    if file.read(len(MAGIC)) != MAGIC:
        raise UserError(f"{path.name} is no journal of this version of zo_peft")
    with explained(f"the header of {path.name} is damaged", ValueError, advice=DAMAGED):
        header = json.loads(_content(file) or b"")
        if not isinstance(header, dict):
            raise ValueError("it is no JSON object")
    return header, file.tell(), _records(file, path.name)


def _records(file: BinaryIO, name: str) -> Iterator[tuple[Record, int]]:
    with file:
        for number in count():
            with explained(f"record {number + 1} of {name} is damaged", ValueError, advice=DAMAGED):
                content = _content(file)
                if content is None:
                    return
                record = Record.unpack(content)
                if record.step != number:
                    raise ValueError(f"it is of step {record.step}")
            yield record, file.tell()


def _content(file: BinaryIO) -> bytes | None:
    """The content of the next frame; None where the file ends before the frame does."""
    start = file.read(_FRAME.size)
    if len(start) < _FRAME.size:
        return None
    length, check, own = _FRAME.unpack(start)
    if crc32(start[:8]) != own or length > LONGEST:
        raise ValueError("its checksum is wrong")
    content = file.read(length)
    if len(content) < length:
        return None
    if crc32(content) != check:
        raise ValueError("its checksum is wrong")
    return content
