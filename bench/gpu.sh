#!/usr/bin/env bash
# The GPU day: what `python -m bench.gpu --help` says, on a machine that has only PyTorch, Triton
# and nvcc. Packages that are missing come from the folder of wheels PAE_WHEELS (.whl/), for this
# run alone. Exit code 1: a test failed or a value was wrong; 2: something is missing.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
python=$(command -v python3 || command -v python) || { echo "no python3 found" >&2; exit 2; }
site=$(mktemp -d) || exit 2
trap 'rm -rf "$site"' EXIT
export PYTHONPATH=$PWD:$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} CUBLAS_WORKSPACE_CONFIG=:4096:8
wheels=${PAE_WHEELS:-.whl}
for wheel in "$wheels"/*.whl; do # one by one: one that does not fit must not stop the others
  name=$(basename "$wheel")
  [ -f "$wheel" ] && ! "$python" -m pip show -q "${name%%-*}" 2>/dev/null &&
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
      --target "$site" "$wheel" >/dev/null 2>&1
done
said=$("$python" -c 'import torch, triton, numpy, torchvision, timm, yaml, huggingface_hub
import safetensors, pytest, pytest_benchmark, cpuinfo, hypothesis' 2>&1) || {
  echo "${said##*$'\n'}; nor is it in $wheels (see bench/README.md)" >&2
  exit 2
}
"$python" -m bench.gpu "$@"
