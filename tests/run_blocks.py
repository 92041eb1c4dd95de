"""Runs the blocks of pages, given as JSON on stdin: by folder, one after the other in that folder.

All in one process, because importing takes seconds: `zo-peft` in a block of nothing else is called,
not started; other blocks of bash are left to bash. A page's blocks of Python share their names, as
in a notebook. A block that is a file is written. The first block of a page that fails is its last.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from zo_peft.cli import main

#: What only a shell understands; and what it does not read.
SHELL = re.compile(r"[|&;<>$`*]")
COMMENT = re.compile(r"(?:^|\s)#[^'\"\n]*$", re.MULTILINE)


def commands(code: str) -> list[list[str]] | None:
    """The words of each command; None where they are not all `zo-peft` and words."""
    plain = COMMENT.sub("", code)
    lines = plain.replace("\\\n", " ").splitlines()
    found = [words for line in lines if (words := shlex.split(line))]
    alone = not SHELL.search(plain) and all(words[0] == "zo-peft" for words in found)
    return found if alone else None


def run(language: str, code: str, file: str | None, names: dict[str, Any]) -> None:
    if file is not None:
        Path(file).write_text(code)
    elif language == "python":
        exec(compile(code, "block", "exec"), names)
    elif (found := commands(code)) is None:
        subprocess.run(["bash", "-euo", "pipefail", "-c", code], check=True)
    else:
        for words in found:
            if status := main(words[1:]):
                raise RuntimeError(f"exit code {status} of {shlex.join(words)}")


def run_page(folder: str, blocks: list[dict[str, Any]]) -> bool:
    """Whether all its blocks ran."""
    os.chdir(folder)
    names: dict[str, Any] = {}
    for block in blocks:
        try:
            run(block["language"], block["code"], block["file"], names)
        except BaseException:
            traceback.print_exc()
            print(f"FAILED: {Path(folder).name}:{block['line']}", file=sys.stderr, flush=True)
            return False
    return True


if __name__ == "__main__":
    ran = [run_page(folder, blocks) for folder, blocks in json.load(sys.stdin).items()]
    sys.exit(not all(ran))
