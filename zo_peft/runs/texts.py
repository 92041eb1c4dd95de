"""What the commands print: the templates of `texts/`, filled in with a command's result."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def text(command: str, result: dict[str, Any]) -> str:
    """A command's result as text. Templates know it as `result`, and its entries by their names."""
    template = ENVIRONMENT.get_template(f"{command}.jinja")
    return template.render(result, result=result).rstrip("\n")


def number(value: float | None, form: str = ",") -> str:
    """A number as `format` writes it, nothing for None and NaN."""
    return "" if value is None or math.isnan(value) else format(value, form)


def mib(size: int) -> str:
    """Bytes in MiB."""
    return f"{size / 2**20:,.0f}"


def percent(shares: Sequence[float]) -> str:
    """The mean of shares in percent and, if there are several, their standard deviation."""
    spread = f" +- {100 * stdev(shares):.1f}" if len(shares) > 1 else ""
    return f"{100 * mean(shares):.1f}{spread}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = [header, ["-" * width for width in widths], *rows]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def aligned(lines: str) -> str:
    """The rows of a Markdown table, a line each, as a table with aligned columns."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines.splitlines()]
    return table(cells[0], cells[1:]) + "\n"


ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("texts")),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters |= {
    "aligned": aligned,
    "json": json.dumps,
    "mib": mib,
    "number": number,
    "percent": percent,
}
