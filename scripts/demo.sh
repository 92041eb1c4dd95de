#!/usr/bin/env bash
# Set up .venv and run the main job on the embedded model, offline. Arguments go to `zo-peft demo`.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
HF_HUB_OFFLINE=1 .venv/bin/zo-peft demo "$@"
