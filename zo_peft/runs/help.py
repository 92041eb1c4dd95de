"""The help of a command on one screen, and guesses at what a mistyped word meant.

What options mean is read from the source of their dataclasses: to import these takes seconds.
"""

import ast
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from textwrap import wrap
from types import MappingProxyType

import yaml

PACKAGE = Path(__file__).parents[1]
TABLE = yaml.safe_load(Path(__file__).with_name("options.yaml").read_bytes())
FILES = PACKAGE / "train" / "settings.yaml", PACKAGE / "runs" / "arguments.yaml"
SETTINGS = {n: text for file in FILES for n, text in yaml.safe_load(file.read_bytes()).items()}
SETS = {name: tuple(options.split()) for name, options in TABLE["sets"].items()}
ALIASES = {alias: name for name, others in TABLE["aliases"].items() for alias in others.split()}

#: The width of the screen, and that of the options' names on it.
WIDTH, NAMES = 80, 33


def guess(word: str, known: Iterable[str]) -> str:
    """` (did you mean ...?)`, if one of the known words is like this one; else nothing."""
    names = {name.lower(): name for name in known}
    bare = word.lstrip("-").partition("=")[0].replace("-", "_").lower()
    meant = [name for name in (bare, ALIASES.get(bare)) if name in names]
    meant = meant or get_close_matches(bare, names, 1)
    dashes = "--" if word.startswith("--") else ""
    return f" (did you mean {dashes}{names[meant[0]]}?)" if meant else ""


def read_by(reads: Sequence[str]) -> set[str]:
    """The options that a command reads: those that are named, and those of sets that are named."""
    return {name for word in reads for name in SETS.get(word, (word,))}


def screen(
    arguments: Sequence[str],
    groups: Sequence[str],
    reads: Collection[str] = (),
    own: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """The options of a command with what they mean: those of some groups, or all.

    Args:
        arguments: the command's dataclasses, as `module:name`.
        groups: titles of `options.yaml`.
        reads: the only options that the command reads; empty: all.
        own: what options mean in this command alone.
    """
    sections = dict(map(_section, arguments))
    if groups:
        meanings = {n: text for options in sections.values() for n, text in options.items()}
        meanings |= TABLE["meanings"]
        shown = {title: TABLE["groups"][title].split() for title in groups}
        sections = {title: {n: meanings[n] for n in names} for title, names in shown.items()}
    return "\n\n".join(
        "\n".join(
            [
                f"{title}:",
                *(_line(n, own.get(n, t)) for n, t in options.items() if not reads or n in reads),
            ]
        )
        for title, options in sections.items()
    )


def _line(name: str, meaning: str) -> str:
    return f"  --{name}".ljust(NAMES) + f"\n{'':{NAMES}}".join(wrap(meaning, WIDTH - NAMES))


def _section(name: str) -> tuple[str, dict[str, str]]:
    """What a dataclass is, and the first sentences on its options."""
    module, _, wanted = name.partition(":")
    source = PACKAGE.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
    classes = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    found = next(node for node in classes if node.name == wanted)
    options = {
        ast.unparse(field.target): _meaning({k.arg: k.value for k in field.value.keywords})
        for field in found.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.value, ast.Call)
    }
    return (ast.get_docstring(found) or "").partition("\n")[0].rstrip("."), options


def _meaning(given: dict[str | None, ast.expr]) -> str:
    """The first sentence of an `HfArg`'s help, with its default in brackets."""
    texts = (node.value for node in ast.walk(given["help"]) if isinstance(node, ast.Constant))
    text = str(next(texts))
    # The dataclasses of a run say where their help is.
    sentence = SETTINGS.get(text, text).partition(". ")[0].rstrip(".")
    if not {"default", "default_factory"} & given.keys():
        return f"{sentence} (required)"
    default = getattr(given.get("default"), "value", None)
    return sentence if default is None or default is False else f"{sentence} [{default}]"
