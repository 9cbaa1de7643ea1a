#!/usr/bin/env bash
# Measure training on one GPU of 80 GB, in at most 12 minutes: see benchmarks/gpu.py.
#
#   benchmarks/gpu.sh             # Mistral-7B with random weights; nothing is downloaded but Python packages
#   SMALL=1 benchmarks/gpu.sh     # the same lines with a tiny model on a CPU, to test the script
#
# PYTHON is the interpreter, by default that of .venv, which is made from requirements.txt if it is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
    [ -x .venv/bin/python ] || make .venv/.run
    PYTHON=.venv/bin/python
fi
exec timeout --kill-after 10 "${LIMIT:-720}" "$PYTHON" benchmarks/gpu.py ${SMALL:+--small} "$@"
