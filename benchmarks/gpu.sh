#!/usr/bin/env bash
# Everything of this program that needs a GPU, in one command: see benchmarks/gpu.py. Needs no installation.
#
#   bash benchmarks/gpu.sh [--out FOLDER] [--device cuda] [--minutes 8] [PART ...]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ -z "${PYTHON:-}" ]; then
    PYTHON="$root/.venv/bin/python"
    [ -x "$PYTHON" ] || PYTHON=python3
fi
export PYTHONPATH="$root/src:$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m benchmarks.gpu "$@"
