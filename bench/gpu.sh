#!/usr/bin/env bash
# The GPU gate: compiles the CUDA kernels, tests, then benchmarks, on a machine that has only PyTorch,
# Triton and nvcc.
#
#   bench/gpu.sh [quick|default|full|tune] [--dry-run]
#
# Leaves <device>-<commit>.json, .md (the tables) and .log in $OUT, or in bench/results/. Every step
# has its own time limit. Exit code 1: a test failed (the benchmarks still run, and their table says
# so), or a benchmark's values were wrong; 2: something is missing.
#
#   PAE_WHEELS    folder of wheels for packages that are missing here (.whl/)
#   PAE_COMMIT    commit of a tree without its history
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

size=default dry=
for argument in "$@"; do
  case $argument in
    quick | default | full | tune) size=$argument ;;
    --dry-run) dry=yes ;;
    *) echo "usage: bench/gpu.sh [quick|default|full|tune] [--dry-run]" >&2; exit 2 ;;
  esac
done

# seconds that the tests and each benchmark may take: below ten minutes together, but for `full`
case $size in
  quick) limits=(180 60 40 35 80) ;;
  default) limits=(180 85 50 45 120) ;;
  full) limits=(600 900 300 600 5400 1800 900 600) ;;
  tune) limits=(180) ;;
esac
parts=(attention pointwise kld step)
[ "$size" = full ] && parts+=(scaling mpa spectrum)
build_limit=60 versions_limit=30 tune_limit=300

work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT
python=$(command -v python3 || command -v python) || { echo "no python3 found" >&2; exit 2; }
export PYTHONPATH=$PWD:$work/site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} CUBLAS_WORKSPACE_CONFIG=:4096:8

# Packages that are missing here, from the folder of wheels; then whatever is still missing is named.
install() {
  local wheels=${PAE_WHEELS:-.whl} wheel name said
  for wheel in "$wheels"/*.whl; do # one by one: one that does not fit must not stop the others
    name=$(basename "$wheel")
    [ -f "$wheel" ] && ! "$python" -m pip show -q "${name%%-*}" 2>>"$work/pip.log" &&
      "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
        --target "$work/site" "$wheel" >>"$work/pip.log" 2>&1
  done
  said=$("$python" -c 'import torch, triton, numpy, torchvision, timm, yaml, huggingface_hub
import safetensors, pytest, pytest_benchmark, cpuinfo, hypothesis' 2>&1) && return
  echo "${said##*$'\n'}; nor is it in $wheels (see bench/README.md)" >&2
  return 1
}

# side NAME SECONDS COMMAND...: its output to the log, beside others; join waits for all of them, and
# their outcomes go to gates. run is one alone.
gates=() failed='' names=() pids=() started=()
side() {
  local name=$1 seconds=$2
  shift 2
  if [ -n "$dry" ]; then
    echo "$name (${seconds}s): $*"
    return
  fi
  timeout -k 10 "$seconds" "$@" >"$work/$name.log" 2>&1 &
  names+=("$name") pids+=($!) started+=("$SECONDS")
}

join() {
  local i
  for i in "${!pids[@]}"; do
    wait "${pids[i]}"
    gate "${names[i]}" $? $((SECONDS - started[i]))
  done
  names=() pids=() started=()
}

run() {
  side "$@"
  join
}

gate() {
  local name=$1 code=$2 seconds=$3 outcome=passed
  if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
    outcome="out of time"
  elif [ "$code" -ne 0 ]; then
    outcome=failed
  elif [[ $name == tests* || $name == sanitizer* ]] && ! grep -qE '[0-9]+ passed' "$work/$name.log"; then
    outcome=failed # all skipped: nothing was tested
  fi
  [[ $outcome == failed || ($name == tests* && $outcome != passed) ]] && failed=yes
  gates+=(--gate "$name=$outcome")
  echo "== $name"
  echo "   $outcome after ${seconds}s: $(grep -E '(passed|failed|skipped|error).* in [0-9]' "$work/$name.log" | tail -1)"
  [ "$outcome" = passed ] || grep -E '^(FAILED|ERROR|E  |=====+ [A-Z])' "$work/$name.log" | cut -c1-160 | head -20
}

# The parts of the tests compile different kernels: at the same time they take a third. Beside them
# the compiled kernels under the sanitizer, each tensor an allocation of its own: an access past its
# end is then one past an allocation.
tests() {
  local seconds=$1 file suite name tool
  local pytest=("$python" -m pytest -q -p no:cacheprovider -p no:xdist) suites=() compiled=()
  for suite in tests/kernels/test_*.py tests/kernels/*/; do # a file, or a folder of them
    grep -rq --include='test_*.py' '^@each(' "$suite" && suites+=("${suite%/}")
    grep -rqE --include='test_*.py' 'mark\.sanitize|sanitized\(' "$suite" && compiled+=("${suite%/}")
  done
  for suite in "${suites[@]}" tests/kernels/test_native.py; do
    name=$(basename "$suite" .py)
    side "tests-${name#test_}" "$seconds" "${pytest[@]}" "$suite" -k gpu
  done
  side tests-engine "$seconds" "${pytest[@]}" tests/pae/test_gpu.py tests/pae/test_graphs.py \
    -k "test_gpu or replays_follow"
  for file in tests/pae/test_gpu_*.py; do
    name=$(basename "$file" .py)
    side "tests-${name#test_gpu_}" "$seconds" "${pytest[@]}" "$file"
  done
  side tests-clock "$seconds" "${pytest[@]}" tests/bench/test_bench.py \
    tests/bench/test_bench_clock.py -k device_clock
  for tool in memcheck racecheck initcheck; do
    if [ -z "$dry" ] && ! command -v compute-sanitizer >"$work/which"; then
      gates+=(--gate "sanitizer-$tool=not installed")
      continue
    fi
    # initcheck must see what other kernels write, data races are looked for in ours alone
    local filter=()
    [ "$tool" = racecheck ] && filter=(--kernel-name kns=pae)
    side "sanitizer-$tool" "$seconds" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer \
      --tool "$tool" "${filter[@]}" --report-api-errors no --error-exitcode 3 \
      "${pytest[@]}" -m sanitize -k "gpu" "${compiled[@]}"
  done
  join
}

# benchmark NAME SECONDS: no group starts in the last quarter
benchmark() {
  local options=()
  case $size in quick | full) options=("--$size") ;; esac
  run "$1" "$2" "$python" -m pytest -q -p no:cacheprovider "bench/bench_$1.py" --benchmark-only \
    --device=cuda --seconds=$(($2 * 3 / 4)) --benchmark-json="$work/$1.json" "${options[@]}"
}

if [ -z "$dry" ]; then
  install || exit 2
  device=$("$python" -c 'import torch; print(torch.cuda.get_device_name())' 2>/dev/null) || {
    echo "PyTorch sees no GPU here" >&2
    exit 2
  }
  commit=${PAE_COMMIT:-$(git describe --always --dirty --exclude '*' 2>/dev/null || echo unknown)}
  export PAE_COMMIT=$commit
  slug=$(tr 'A-Z ' 'a-z-' <<<"$device" | tr -cd 'a-z0-9-')
  out=${OUT:-bench/results}
  mkdir -p "$out"
  stem=$out/$slug-$commit
fi

arch=$([ -n "$dry" ] || "$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
# -lineinfo, three times the size, is for the sanitizers: they name lines
run build "$build_limit" env NVCC_APPEND_FLAGS=-lineinfo PAE_CUDA=require \
  PAE_CUDA_ARCHS="${PAE_CUDA_ARCHS:-$arch}" \
  "$python" csrc/native_build.py
run versions "$versions_limit" "$python" -m pae_kernels
[ -z "$dry" ] && cat "$work/versions.log"
tests "${limits[0]}"
if [ "$size" = tune ]; then
  run tune "$tune_limit" "$python" -m bench.studies.tune_attention --seconds $((tune_limit - 30))
else
  for i in "${!parts[@]}"; do benchmark "${parts[i]}" "${limits[i + 1]}"; done
fi
[ -n "$dry" ] && exit

for log in "$work"/*.log; do printf '\n===== %s\n' "$(basename "$log" .log)"; cat "$log"; done >"$stem.log"
if [ "$size" = tune ]; then
  tee "$stem-tiles.md" <"$work/tune.log"
else
  written=()
  for part in "${parts[@]}"; do
    [ -s "$work/$part.json" ] && written+=("$work/$part.json")
  done
  if [ ${#written[@]} -gt 0 ] && "$python" -m bench.merge "$stem.json" "${written[@]}" "${gates[@]}"; then
    "$python" -m bench.table "$stem.json" | tee "$stem.md"
  else
    echo "no benchmark finished; see $stem.log" >&2
    failed=yes
  fi
fi
[ -z "$failed" ] || { echo "a test failed or ran out of time; see $stem.log" >&2; exit 1; }
