"""Files as people have them: compressed, of other encodings and separators, Parquet."""

import csv
import gzip
from pathlib import Path
from typing import Any

import pandas
import pytest

from zo_peft import UserError
from zo_peft.data import read_rows

ROWS = [{"Ticket": 'Café "Zur Mühle"; 3, 4', "Type": "x"}, {"Ticket": "two\nlines", "Type": "y"}]
FRAME = pandas.DataFrame(ROWS)


@pytest.mark.parametrize("name", ["a.csv", "A.CSV", "a.b.csv"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables_that_pandas_writes(
    name: str, separator: str, encoding: str, tmp_path: Path
) -> None:
    FRAME.to_csv(tmp_path / name, sep=separator, encoding=encoding, index=False)
    assert read_rows(tmp_path / name) == ROWS


def test_cp1252_is_read_and_a_part_of_it_shown(tmp_path: Path) -> None:
    FRAME.to_csv(tmp_path / "a.csv", sep=";", encoding="cp1252", index=False)
    with pytest.warns(UserWarning, match=r"a\.csv is not UTF-8 .* cp1252, with .*Café.*iconv"):
        assert read_rows(tmp_path / "a.csv") == ROWS


def test_a_tsv_has_quotes_only_where_it_is_no_table_without_them(tmp_path: Path) -> None:
    FRAME.to_csv(tmp_path / "a.tsv", sep="\t", index=False)
    assert read_rows(tmp_path / "a.tsv") == ROWS
    # As in GLUE's files: a quote at the start of a field is a part of the text.
    (tmp_path / "a.tsv").write_text('a\tb\n"x" y\t"z"\n"u"\tv ""w""\n')
    rows = [{"a": '"x" y', "b": '"z"'}, {"a": '"u"', "b": 'v ""w""'}]
    assert read_rows(tmp_path / "a.tsv") == rows


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_a_tsv_in_which_quotes_are_doubled_is_read_as_it_was_written(
    quoting: int, tmp_path: Path
) -> None:
    FRAME[:1].to_csv(tmp_path / "a.tsv", sep="\t", index=False, quoting=quoting)
    assert read_rows(tmp_path / "a.tsv") == ROWS[:1]


def test_the_line_in_which_excel_names_the_separator_is_no_header(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("sep=;\n" + FRAME.to_csv(sep=";", index=False))
    assert read_rows(tmp_path / "a.csv") == ROWS


def test_compressed_files(tmp_path: Path) -> None:
    content = gzip.compress(FRAME.to_csv(index=False).encode())
    for name in ("a.csv.gz", "A.CSV.GZ"):
        (tmp_path / name).write_bytes(content)
        assert read_rows(tmp_path / name) == ROWS
    (tmp_path / "a.csv.gz").write_bytes(content[:-9])
    with pytest.raises(UserError, match=r"cannot be read: .*check the path and the file"):
        read_rows(tmp_path / "a.csv.gz")


def test_parquet_gives_pythons_values(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "a", "label": 1, "turns": [{"from": "human", "value": "é"}], "score": None},
        {"text": "b", "label": 2**60 + 1, "turns": [], "score": 0.5},
    ]
    pandas.DataFrame(rows).astype({"score": "Float64"}).to_parquet(tmp_path / "a.PARQUET")
    assert read_rows(tmp_path / "a.PARQUET") == rows
