#!/bin/sh
# The figures of docs/verify-<name>*.md, on a machine with a CUDA GPU, torch, triton and the modelopt extra.
#
#     scripts/gpu/verify_gpu.sh h100
set -eu
cd "$(dirname "$0")/../.."
PYTHONPATH=.:scripts/make "${PYTHON:-python3}" scripts/gpu/verify_gpu.py "docs/verify-$1"
PYTHONPATH=.:scripts/make "${PYTHON:-python3}" scripts/gpu/verify_gpu_cli.py "docs/verify-$1-commands"
if "${PYTHON:-python3}" -c "import flashinfer" 2>/dev/null; then
  PYTHONPATH=.:scripts/make "${PYTHON:-python3}" scripts/gpu/gpu_oracles.py "docs/verify-$1-oracles.json"
fi
