"""The site: `sphinx-build docs out/site`, offline; `--fail-on-warning` also checks every link."""

from dataclasses import fields
from typing import Any

from zo_peft import ZOConfig, __version__
from zo_peft.runs.arguments import DataArguments, ModelArguments

project = "zo_peft"
version = release = __version__
copyright = "zo_peft; Apache 2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "zo_peft"
html_copy_source = False
exclude_patterns = ["Thumbs.db"]

# Anchors as GitHub makes them, so that a page reads and links the same there.
myst_heading_anchors = 3

# Docstrings are written with Markdown's code spans.
default_role = "code"
napoleon_google_docstring = True
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True


#: Settings, whose fields the command line describes.
SETTINGS: dict[str, Any] = {
    f"{owner.__module__}.{owner.__qualname__}": owner
    for owner in (ZOConfig, ModelArguments, DataArguments)
}


def _describe_fields(
    app: Any, what: str, name: str, obj: object, options: Any, lines: list[str]
) -> None:
    """Add an `Args:` section with the `help` of each field of our own."""
    if name not in SETTINGS:
        return
    owner = SETTINGS[name]
    told = {field.name: field.metadata["help"] for field in fields(owner) if field.metadata}
    own = [f"    {field}: {told[field]}" for field in owner.__annotations__ if field in told]
    lines += ["", "Args:", *own, ""]


def setup(app: Any) -> None:
    """Have settings described as on the command line, before napoleon reads the docstring."""
    app.connect("autodoc-process-docstring", _describe_fields, priority=400)
