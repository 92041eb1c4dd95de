"""Read files into rows."""

import codecs
import csv
import gzip
import io
import json
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from zo_peft.data.forms import Row
from zo_peft.errors import Notice, UserError, explained


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a JSON (.jsonl, .ndjson, .json), CSV, TSV or Parquet file, in order.

    The suffix may be in upper case, and `.gz` may follow it. JSON files hold one object after
    another, most often a line each, or one list of objects. CSV files begin with a header line,
    whose commas, semicolons or tabs separate the columns, and all their values are strings. In TSV
    files quotes are ordinary characters, as in GLUE's files, unless they are a table only with
    quotes as in CSV files. Text is UTF-8, UTF-16 with its mark, or cp1252, which a warning says.

    A UserError says that the file is missing, empty or of another kind, or a line cannot be read.
    """
    path = Path(path)
    readers: dict[str, Callable[[bytes, Path], list[Row]]] = {
        **dict.fromkeys((".jsonl", ".ndjson", ".json"), _read_json),
        ".csv": _read_csv,
        ".tsv": _read_tsv,
        ".parquet": _read_parquet,
    }
    is_packed = path.suffix.lower() == ".gz"
    kind = Path(path.stem if is_packed else path.name).suffix.lower()
    if kind not in readers:
        code = f"pandas.read_excel({path.name!r}).to_csv({path.stem + '.csv'!r}, index=False)"
        raise UserError(
            f"{path.name} is of an unknown kind; unpack it, or convert it to {', '.join(readers)}, "
            f'of a spreadsheet by python -c "import pandas; {code}"'
        )
    errors, advice = (OSError, EOFError, zlib.error), "check the path and the file"
    with explained(f"{path} cannot be read", *errors, advice=advice):
        content = path.read_bytes()
        content = gzip.decompress(content) if is_packed else content
    rows = readers[kind](content, path)
    if not rows:
        raise UserError(f"{path.name} has no rows; it must hold at least one example")
    return rows


def _read_parquet(content: bytes, path: Path) -> list[Row]:
    import pyarrow
    from pyarrow import parquet

    what, errors = f"{path.name} cannot be read as Parquet", (pyarrow.ArrowException, OSError)
    with explained(what, *errors, advice="save it anew"):
        return parquet.read_table(io.BytesIO(content)).to_pylist()


def _text(content: bytes, path: Path) -> str:
    """The text of a file, with line feeds at the ends of lines."""
    is_marked, name = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)), path.name
    if b"\0" in content and not is_marked:
        line = content.count(b"\n", 0, content.index(b"\0")) + 1
        cure = f"use tr -d '\\0' < {name} > new_{name}; or, if it is UTF-16, iconv -f utf-16le"
        what = f"{name}, line {line} holds a NUL character"
        raise UserError(f"{what}; {cure} -t utf-8 {name} > new_{name}")
    try:
        text = content.decode("utf-16" if is_marked else "utf-8-sig")
    except UnicodeDecodeError as error:
        text, start = content.decode("cp1252", errors="replace"), error.start
        what = f"{name} is not UTF-8 (byte {start})"
        cure = f"iconv -f ENCODING -t utf-8 {name} > new_{name}"
        # In western languages, for which cp1252 is, most characters are ASCII.
        beyond = len(content.translate(None, delete=bytes(range(128))))
        if beyond * 4 > len(content) or "\ufffd" in text:
            raise UserError(f"{what}; convert it, from gb18030 or another: {cure}") from None
        shown = " ".join(text[max(0, start - 20) : start + 20].split())
        message = f"{what}, and is read as cp1252, with {shown!r} there; if that is wrong: {cure}"
        warnings.warn(message, Notice, stacklevel=5)
    return re.sub("\r\n?", "\n", text)


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
            what = f"{path.name}, line {line} is not JSON: {error}; write one object after another"
            raise UserError(
                f"{what}, without commas between them, or one list of objects"
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
    text = re.sub(r"\Asep=.\n", "", _text(content, path))  # Excel's own first line
    header = re.sub('"[^"]*"', "", text.partition("\n")[0])
    # Commas, where others are not more.
    return _table(text, path, max(",;\t", key=header.count), csv.QUOTE_MINIMAL)


def _read_tsv(content: bytes, path: Path) -> list[Row]:
    text = _text(content, path)
    quoted = [field for field in re.split("[\t\n]", text) if '"' in field]
    is_quoted = all(re.fullmatch('"([^"]|"")*"', field) for field in quoted)
    if is_quoted and (text.startswith('"') or any('""' in field[1:-1] for field in quoted)):
        return _table(text, path, "\t", csv.QUOTE_MINIMAL)
    try:
        return _table(text, path, "\t", csv.QUOTE_NONE)
    except UserError:
        with suppress(UserError):
            return _table(text, path, "\t", csv.QUOTE_MINIMAL)
        raise


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
                fewer = "more" if None in row else "fewer"
                what = f"{path.name}, line {reader.line_num} has {fewer} fields than the header"
                cure = f"put a field that holds {delimiter!r} in quotes, and leave out none"
                raise UserError(f"{what}; {cure}")
            rows.append(row)
    except csv.Error as error:
        # DictReader has not counted the line that its inner reader failed on.
        line = reader.reader.line_num
        cure = 'in a quoted field, write a quote as ""'
        raise UserError(f"{path.name}, line {line}: {error}; {cure}") from None
    return rows
