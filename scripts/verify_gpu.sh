#!/bin/sh
# The figures of docs/verify-<name>*.md, on a machine with a CUDA GPU, torch, triton and the modelopt extra.
#
#     scripts/verify_gpu.sh h200
set -eu
cd "$(dirname "$0")/.."
PYTHONPATH=. "${PYTHON:-python3}" scripts/verify_gpu.py "docs/verify-$1"
PYTHONPATH=. "${PYTHON:-python3}" scripts/verify_gpu_cli.py "docs/verify-$1-commands"
