"""Read files into rows."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from zo_peft.data.forms import Row
from zo_peft.errors import UserError

#: How compressed files are opened, by their last suffix.
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
#: What turns files of other kinds into one that is read.
CURES = {
    **dict.fromkeys(
        (".xlsx", ".xls", ".ods"),
        'python -c "import pandas; pandas.read_excel({0!r}).to_csv({1!r}, index=False)"',
    ),
    ".feather": "python -c \"import pandas; pandas.read_feather({0!r}).to_parquet('{1}.parquet')\"",
    ".zip": "unzip {0}",
}


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a JSON (.jsonl, .ndjson, .json), CSV, TSV or Parquet file, in order.

    The suffix may be in upper case, and `.gz`, `.bz2` or `.xz` may follow it. JSON files hold one
    object after another, most often a line each, or one list of objects. CSV files begin with a
    header line, whose commas, semicolons or tabs separate the columns, and all their values are
    strings. In TSV files quotes are ordinary characters, as in GLUE's files, unless the lines only
    have as many fields as the header where quotes are read as in CSV files. Text is UTF-8, UTF-16
    with its byte-order mark, or cp1252, of which a warning shows a part.

    Raises:
        UserError: the file is missing, empty or of another kind, or a line cannot be read.
    """
    path = Path(path)
    readers: dict[str, Callable[[bytes, Path], list[Row]]] = {
        **dict.fromkeys((".jsonl", ".ndjson", ".json"), _read_json),
        ".csv": _read_csv,
        ".tsv": _read_tsv,
        ".parquet": _read_parquet,
    }
    suffixes = [suffix.lower() for suffix in ["", *path.suffixes]]
    opener = OPENERS.get(suffixes[-1], Path.open)
    kind = suffixes[-2] if suffixes[-1] in OPENERS else suffixes[-1]
    if kind not in readers:
        cure = CURES.get(kind, f"convert it to {', '.join(readers)}")
        cure = cure.format(path.name, f"{path.stem}.csv")
        raise UserError(f"{path.name} is of an unknown kind; {cure}")
    try:
        with opener(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read: {why}; check the path and the file") from None
    rows = readers[kind](content, path)
    if not rows:
        raise UserError(f"{path.name} has no rows; it must hold at least one example")
    return rows


def _read_parquet(content: bytes, path: Path) -> list[Row]:
    try:
        table = parquet.read_table(io.BytesIO(content))
    except (pyarrow.ArrowException, OSError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f"{path.name} cannot be read as Parquet: {why}; save it anew") from None
    if twice := _twice(table.column_names):
        raise UserError(f"{path.name} has the column {twice[0]!r} twice; rename or drop one")
    return table.to_pylist()


def _text(content: bytes, path: Path) -> str:
    """The text of a file, with line feeds at the ends of lines."""
    is_marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if b"\0" in content and not is_marked:
        line = content.count(b"\n", 0, content.index(b"\0")) + 1
        # UTF-16 has one in nearly every character of a western language.
        is_wide = content.count(b"\0") * 3 > len(content)
        cure = "if it is UTF-16: iconv -f utf-16le -t utf-8" if is_wide else "tr -d '\\0' <"
        what = f"{path.name}, line {line} holds a NUL character"
        raise UserError(f"{what}; {cure} {path.name} > new_{path.name}")
    try:
        text = content.decode("utf-16" if is_marked else "utf-8-sig")
    except UnicodeDecodeError as error:
        text = _western(content, error.start, path)
    return re.sub("\r\n?", "\n", text)


def _western(content: bytes, start: int, path: Path) -> str:
    """The text in cp1252, where few bytes are beyond ASCII, as in western languages."""
    beyond = len(content.translate(None, delete=bytes(range(128))))
    try:
        if beyond * 4 > len(content):
            raise ValueError
        text = content.decode("cp1252")
    except ValueError:
        raise UserError(
            f"{path.name} is not UTF-8 (byte {start}); convert it from its encoding, for example "
            f"iconv -f gb18030 -t utf-8 {path.name} > new_{path.name}"
        ) from None
    shown = " ".join(text[max(0, start - 20) : start + 20].split())
    _warn(
        f"{path.name} is not UTF-8, and is read as cp1252, with {shown!r} at byte {start}; if that "
        f"is wrong: iconv -f ENCODING -t utf-8 {path.name} > new_{path.name}"
    )
    return text


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=6)


_SPACE = re.compile(r"[ \t\r\n]*")


def _read_json(content: bytes, path: Path) -> list[Row]:
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    text, rows = _text(content, path), list[Row]()
    place = _SPACE.match(text).end()  # type: ignore[union-attr]
    while place < len(text):
        try:
            value, stop = decoder.raw_decode(text, place)
            found = value if isinstance(value, list) else [value]
            if not all(isinstance(row, dict) for row in found):
                raise ValueError("it is no object of columns")
        except (ValueError, RecursionError) as error:
            line = text.count("\n", 0, place) + 1
            raise UserError(
                f"{path.name}, line {line} is not JSON: {error}; write one object after another, "
                "without commas between them, or one list of objects"
            ) from None
        rows += found
        place = _SPACE.match(text, stop).end()  # type: ignore[union-attr]
    return rows


def _object(pairs: list[tuple[str, Any]]) -> Row:
    if twice := _twice([name for name, _ in pairs]):
        raise ValueError(f"an object has {twice[0]!r} twice")
    return dict(pairs)


def _twice(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _read_csv(content: bytes, path: Path) -> list[Row]:
    text = _text(content, path)
    header = re.sub('"[^"]*"', "", text.partition("\n")[0])
    # Commas, where others are not more.
    return _table(text, path, max(",;\t", key=header.count), csv.QUOTE_MINIMAL)


def _read_tsv(content: bytes, path: Path) -> list[Row]:
    text = _text(content, path)
    try:
        return _table(text, path, "\t", csv.QUOTE_NONE)
    except UserError as error:
        try:
            rows = _table(text, path, "\t", csv.QUOTE_MINIMAL)
        except UserError:
            raise error from None
    _warn(f"{path.name} is read with quotes around fields, because it has no table without them")
    return rows


def _table(text: str, path: Path, delimiter: str, quoting: Any) -> list[Row]:
    """The rows behind a header."""
    # By default a field has at most 131,072 characters.
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    file = io.StringIO(text, newline="")
    reader = csv.DictReader(file, strict=True, delimiter=delimiter, quoting=quoting)
    rows = []
    try:
        if twice := _twice(reader.fieldnames or ()):
            raise UserError(f"{path.name}: the header has {twice[0]!r} twice; rename or drop one")
        for row in reader:
            if None in row or None in row.values():
                fewer, cure = "fewer", "leave out no field"
                if None in row:
                    fewer, cure = "more", f"put a field that holds {delimiter!r} in quotes"
                where = f"{path.name}, line {reader.line_num}"
                raise UserError(f"{where} has {fewer} fields than the header; {cure}")
            rows.append(row)
    except csv.Error as error:
        # DictReader has not counted the line that its inner reader failed on.
        line = reader.reader.line_num
        raise UserError(
            f'{path.name}, line {line}: {error}; in a quoted field, write a quote as ""'
        ) from None
    return rows
