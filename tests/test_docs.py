"""README and docs: every block of code runs or says what it needs, and the site builds cleanly.

The pages' models and data sets of the Hub are stand-ins from a local server: the embedded model
under each name, and a few rows. Budgets are cut to `FORWARD_PASSES`.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from hub_client import environment, parquet, written
from hub_server import Hub
from markdown_it import MarkdownIt
from run_blocks import commands

from zo_peft.tools.demo import EMBEDDED

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

#: Runs; shown, as output or a formula; and what a block may need that is not here.
RUN, SHOWN = {"bash", "python", "yaml"}, {"text"}
NEEDS = {"a GPU", "the Hub", "a package registry", "minutes", "another program"}

NEEDED = re.compile(r"<!-- needs: (.+?) -->\s*")
#: The first line of a block that is a file: its name as a comment.
FILE = re.compile(r"# ([\w.-]+\.(?:py|yaml))\n")
BUDGET = re.compile(r"(max_forward_passes[ =])([\d_]+)")
FORWARD_PASSES = 100

#: The token of the user `you`; and models of the Hub that pages name.
TOKEN = "a token of the pages"
MODELS = ("facebook/opt-1.3b", "facebook/opt-13b")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it begins, what it is, the file that it is, and what it needs."""

    line: int
    language: str
    code: str
    file: str | None
    needs: str | None


def blocks_of(text: str) -> list[Block]:
    """A page's blocks, without directives of the site's generator."""
    blocks = []
    tokens = MarkdownIt().parse(text)
    for before, token in zip([None, *tokens], tokens):
        if token.type == "code_block":
            blocks.append(Block(token.map[0] + 1, "", token.content, None, None))
        if token.type != "fence" or token.info.startswith("{"):
            continue
        comment = before.content if before is not None and before.type == "html_block" else ""
        needs, file = NEEDED.fullmatch(comment), FILE.match(token.content)
        blocks.append(
            Block(
                token.map[0] + 1,
                token.info,
                token.content,
                file and file[1],
                needs and needs[1],
            )
        )
    return blocks


BLOCKS = {page: blocks_of(page.read_text()) for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_runs_or_says_what_it_needs(page: Path) -> None:
    for block in BLOCKS[page]:
        where = f"{page.name}:{block.line}"
        assert block.language in RUN | SHOWN, f"{where} is {block.language or 'nothing'!r}"
        needs = set((block.needs or "minutes").split(", "))
        assert needs <= NEEDS, f"{where} needs {needs}"


def test_a_comment_before_a_block_says_what_it_needs() -> None:
    text = "a\n\n<!-- needs: a GPU -->\n```bash\nb\n```\n\n```python\n# c.py\nd\n```\n\n    e\n"
    assert blocks_of(text) == [
        Block(4, "bash", "b\n", None, "a GPU"),
        Block(8, "python", "# c.py\nd\n", "c.py", None),
        Block(13, "", "e\n", None, None),
    ]


def test_a_comment_ends_with_its_line() -> None:
    lines = "zo-peft a run  # it runs\nzo-peft b \\\n    run\nzo-peft c  # the last\nzo-peft d\n"
    assert commands(lines) == [
        ["zo-peft", "a", "run"],
        ["zo-peft", "b", "run"],
        ["zo-peft", "c"],
        ["zo-peft", "d"],
    ]
    assert commands("zo-peft a | head\n") is None


#: Where a model says how many tokens it takes.
LIMITS = {
    "config.json": "max_position_embeddings",
    "tokenizer_config.json": "model_max_length",
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    model = {path.name: path.read_bytes() for path in (EMBEDDED / "model").iterdir()}
    # Answered examples make prompts long; the positions of this model are rotary.
    for name, limit in LIMITS.items():
        model[name] = json.dumps(json.loads(model[name]) | {limit: 2048}).encode()
    written(root / "model", model)
    rte = parquet(
        [
            {"premise": f"The {thing} was {word}.", "hypothesis": f"It was {word}.", "label": 0}
            for thing in ("room", "soup", "film", "book", "band", "bed", "wine", "plot")
            for word in ("lovely", "poor", "nice", "dull", "fine")
        ]
    )
    configs = [
        {
            "config_name": "rte",
            "data_files": [
                {"split": split, "path": f"rte/{split}-*"} for split in ("train", "validation")
            ],
        }
    ]
    glue = {
        "README.md": f"---\n{json.dumps({'configs': configs})}\n---\n".encode(),
        "rte/train-00000-of-00001.parquet": rte,
        "rte/validation-00000-of-00001.parquet": rte,
    }
    written(root / "super_glue", glue)
    models = dict.fromkeys(MODELS, root / "model")
    data = {"aps/super_glue": root / "super_glue"}
    with Hub(models, data, root / "created", {TOKEN: "you"}) as server:
        yield server


def files_of_the_user(folder: Path) -> None:
    """The `train.tsv` and `dev.tsv` that pages read: labelled sentences."""
    for name, source, rows in (("train.tsv", "train.jsonl", 200), ("dev.tsv", "test.jsonl", 40)):
        examples = [json.loads(line) for line in (EMBEDDED / source).open()][:rows]
        lines = ["sentence\tlabel", *(f"{row['text']}\t{row['label']}" for row in examples)]
        (folder / name).write_text("\n".join(lines) + "\n")


def cut(code: str) -> str:
    """The code with budgets of at most `FORWARD_PASSES`."""

    def smaller(found: re.Match[str]) -> str:
        return found[1] + str(min(int(found[2]), FORWARD_PASSES))

    return BUDGET.sub(smaller, code)


def test_the_blocks_of_all_pages_run(hub: Hub, tmp_path: Path) -> None:
    pages = {}
    for page, blocks in BLOCKS.items():
        runs = [block for block in blocks if block.language in RUN and block.needs is None]
        folder = tmp_path / page.name
        folder.mkdir()
        files_of_the_user(folder)
        pages[str(folder)] = [asdict(block) | {"code": cut(block.code)} for block in runs]
    settings = environment(tmp_path, hub.url, HF_TOKEN=TOKEN)
    process = subprocess.run(
        [sys.executable, Path(__file__).parent / "run_blocks.py"],
        input=json.dumps(pages),
        capture_output=True,
        text=True,
        env={**settings, "PATH": f"{Path(sys.executable).parent}:{settings['PATH']}"},
        cwd=tmp_path,
    )
    failed = re.findall("FAILED: .*", process.stderr)
    assert process.returncode == 0, f"{failed}\n{process.stderr[-6000:]}"


def test_the_site_builds_without_a_warning_and_so_without_a_broken_link(tmp_path: Path) -> None:
    build = ["-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going"]
    process = subprocess.run(
        [sys.executable, *build, ROOT / "docs", tmp_path / "site"], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    reference = (tmp_path / "site" / "api.html").read_text()
    assert "zo_peft.train.base.BaseTrainer.push_to_hub" in reference
    assert "The run stops after so many forward passes" in reference
    assert not re.findall(r'id="zo_peft\.[\w.]*\._\w+"', reference)
