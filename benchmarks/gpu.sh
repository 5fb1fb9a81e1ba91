#!/usr/bin/env bash
# What a machine with a GPU is asked, in at most 9 minutes: the gpu tests, then speed and memory of DPO.
#
#   benchmarks/gpu.sh [FOLDER]    # writes tests.log, dpo.md and dpo.json there (default: runs/gpu)
#
# PYTHON names the interpreter. TRL is measured beside where it is installed.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-runs/gpu}
python=${PYTHON:-python}
mkdir -p "$folder"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

timeout 150 "$python" -m pytest -q -m gpu -p no:cacheprovider tests 2>&1 | tee "$folder/tests.log"
status=${PIPESTATUS[0]}
timeout 380 "$python" benchmarks/gpu_dpo.py --seconds 90 --json "$folder/dpo.json" 2>"$folder/dpo.log" | tee "$folder/dpo.md"
[ "${PIPESTATUS[0]}" = 0 ] || { tail -n 20 "$folder/dpo.log"; exit 1; }
exit "$status"
