"""Runs scripts, each in a fork of this process, which has imported what they all need.

Importing takes longer than most of their smallest forms. Each line of stdin is a list in JSON: the
folder to run in, the script and its options. The answer is a line with the exit code; `stdout` and
`stderr` in the folder are what the script printed.
"""

import json
import os
import runpy
import sys
import traceback
from pathlib import Path

import bitsandbytes  # noqa: F401
import datasets  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import peft  # noqa: F401

import zo_peft.cli
import zo_peft.runs.run  # noqa: F401


def run(folder: str, script: str, options: list[str]) -> int:
    """The exit code of the script, as the only thing that this process does from now on."""
    os.chdir(folder)
    for stream, name in enumerate(("stdout", "stderr"), start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.argv = [script, *options]
    sys.path.insert(0, str(Path(script).parent))
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            sys.stdin.close()
            os._exit(run(*json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
