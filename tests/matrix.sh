#!/usr/bin/env bash
# The suite's quick part on the oldest and the newest Python, each with the oldest supported
# PyTorch (and its Triton) and with the newest that pip finds, and on the first Python with the
# oldest version that each dependency in pyproject.toml allows:
#
#     tests/matrix.sh FOLDER [PYTHON...]      default: python3.10 python3.13
#
# FOLDER takes an sdist of the committed tree, unpacked, and an environment for each, about 6 GB a
# piece; a second run finds them there. Quick is what neither compiles kernels nor builds a site or
# a wheel, nor runs benchmarks. Its last lines say what was run and how it ended.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,11s/^# \?//p' "$0"; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)
shift
[ $# -gt 0 ] || set -- python3.10 python3.13
bounds=$(sed -n '/^dependencies = \[/,/^\]/s/^  "\([a-z]*\)>=\([0-9.]*\).*/\1==\2.*/p' \
  "$root/pyproject.toml")
oldest=$(grep '^torch==' <<< "$bounds")
quick=(tests/pae tests/train tests/test_layers.py tests/test_processes.py
  tests/kernels/attention tests/kernels/test_pointwise.py tests/kernels/test_adaptive.py
  tests/kernels/koopman tests/kernels/spectrum tests/kernels/test_backends.py)

said=() failed=0
rows=("$1 $bounds")
for python in "$@"; do rows+=("$python $oldest" "$python torch"); done
for row in "${rows[@]}"; do
  read -r -d '' python pins <<< "$row" || true
  case $pins in "$oldest") name=oldest-torch ;; torch) name=newest ;; *) name=oldest-pins ;; esac
  tree="$folder/$python-$name"
  mkdir -p "$tree/source"
  git -C "$root" archive HEAD | tar -x -C "$tree/source"
  result="$tree/result.txt"
  (
    set -e
    cd "$tree"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/pip install -q "setuptools>=77"
    (cd source && ../.venv/bin/python -c "
import setuptools.build_meta as hooks
hooks.build_sdist('..')")
    tar -xf pae-*.tar.gz --strip-components=1
    # shellcheck disable=SC2086
    .venv/bin/pip install -q -e ".[test]" $pins
    .venv/bin/python -m pytest -q "${quick[@]}"
  ) > "$result" 2>&1 && status=passed || { status=failed failed=1; }
  versions=$("$tree/.venv/bin/python" -c "
import platform, importlib.metadata as m
print(platform.python_version(), *(f'{p} {m.version(p)}' for p in ('torch', 'triton', 'timm', 'numpy')))
" 2>&1 | tail -1)
  said+=("$status  Python $versions: $(tail -1 "$result")")
  echo "${said[-1]}"
  [ "$status" = passed ] || grep -E '^(FAILED|ERROR)' "$result" || tail -20 "$result"
done
echo
printf '%s\n' "${said[@]}"
exit "$failed"
