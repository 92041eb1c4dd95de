"""The journal: records come back, and damage is found."""

import resource
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zo_peft import Direction, UserError
from zo_peft.core.journal import JOURNAL_NAME, MAGIC, Journal, Record, framed, read

finite = st.floats(allow_nan=False, allow_infinity=False)
seeds = st.integers(0, 2**63 - 1)
records = st.builds(
    Record,
    st.just(0),
    *[finite] * 7,
    seeds,
    seeds,
    st.lists(st.tuples(seeds, finite), max_size=20).map(lambda terms: Direction(tuple(terms))),
    st.none() | seeds,
    seeds,
    st.dictionaries(st.text(max_size=5), finite | st.text(max_size=5), max_size=3),
)


def record(step: int, terms: int = 8) -> Record:
    direction = Direction(tuple((2**62 + step * terms + i, 0.1 * i) for i in range(terms)))
    return Record(step, 1e-3, 1.0, 0.5, 0.6, 0.7, 0.8, 1e-2, 8 * step, 64 * step, direction)


def written(folder: Path, count: int = 5) -> Path:
    journal = Journal(folder / JOURNAL_NAME, {"a": 1})
    for step in range(count):
        journal.append(record(step))
    journal.close()
    return journal.path


@given(records)
def test_a_record_comes_back(made: Record) -> None:
    assert Record.unpack(made.pack()) == made


def test_a_journal_comes_back(tmp_path: Path) -> None:
    header, found = read(written(tmp_path))
    assert header == {"a": 1}
    assert list(found) == [record(step) for step in range(5)]


def test_a_thousand_steps_of_eight_candidates_are_small(tmp_path: Path) -> None:
    size = written(tmp_path, 1000).stat().st_size
    assert size <= 350 * 1024
    assert size == pytest.approx(1000 * (12 + 104 + 8 * 16), rel=0.01)


@pytest.mark.parametrize("missing", [1, 50, 243])
def test_a_torn_last_record_is_cut_off(missing: int, tmp_path: Path) -> None:
    path = written(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-missing])
    assert len(list(read(path)[1])) == 4
    journal = Journal.resumed(path, path)
    journal.append(record(4))
    journal.close()
    assert path.read_bytes() == whole


def test_every_other_damage_is_named_by_its_record(tmp_path: Path) -> None:
    """Any byte flipped: it is found, where it is, and never taken for a torn record."""
    path = written(tmp_path)
    whole = path.read_bytes()
    size = 12 + 104 + 8 * 16
    start = len(whole) - 5 * size
    for place in range(start, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        number = (place - start) // size + 1
        with pytest.raises(UserError, match=f"record {number} of zo_journal is damaged"):
            Journal.resumed(path, path)
    for place in range(len(MAGIC), start, 5):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="header of zo_journal is damaged"):
            read(path)
    path.write_bytes(MAGIC + framed(b"[" * 100_000))
    with pytest.raises(UserError, match="header of zo_journal is damaged: maximum recursion"):
        read(path)
    path.write_bytes(b"PK\3\4" + whole)
    with pytest.raises(UserError, match="no journal of this version"):
        read(path)
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "nowhere")


def test_records_in_another_order_are_damage(tmp_path: Path) -> None:
    path = written(tmp_path, 1)
    journal = Journal.resumed(path, path)
    journal.append(record(7))
    with pytest.raises(UserError, match="record 2 of zo_journal is damaged: it is of step 7"):
        list(read(path)[1])


@pytest.mark.parametrize("field", range(7))
def test_what_is_not_finite_is_refused(field: int) -> None:
    """But for a loss, which is infinite where no candidate's was finite."""
    for value in (float("nan"), float("inf")):
        packed = bytearray(record(0).pack())
        packed[8 + 8 * field : 16 + 8 * field] = struct.pack("<d", value)
        if field == 5 and value == float("inf"):
            assert Record.unpack(bytes(packed)).loss == value
            continue
        with pytest.raises(ValueError, match="not finite"):
            Record.unpack(bytes(packed))


@settings(max_examples=300)
@given(st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    try:
        Record.unpack(content)
    except ValueError:
        return
    assert len(content) >= 104


def test_going_back_keeps_what_is_dropped(tmp_path: Path) -> None:
    path = written(tmp_path)
    before = path.read_bytes()
    Journal.resumed(path, path, keep=2).close()
    assert len(list(read(path)[1])) == 2
    assert path.with_name("zo_journal.old").read_bytes() == before
    with pytest.raises(UserError, match="2 records, but the checkpoint is of step 3"):
        Journal.resumed(path, path, keep=3)


def test_a_new_run_keeps_the_journal_before(tmp_path: Path) -> None:
    before = written(tmp_path).read_bytes()
    written(tmp_path, 1)
    assert (tmp_path / "zo_journal.old").read_bytes() == before


def test_a_full_disk_leaves_whole_records(tmp_path: Path) -> None:
    path = written(tmp_path)
    before = path.read_bytes()
    journal = Journal.resumed(path, path)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        with pytest.raises(UserError, match=r"File too large.*resume_from_checkpoint True"):
            journal.append(record(5))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    journal.append(record(5))
    assert list(read(path)[1]) == [record(step) for step in range(6)]


def test_records_are_compared_whole() -> None:
    """What `other settings` rests on."""
    assert record(1) == record(1)
    assert record(1) != replace(record(1), backoff=0.5)
