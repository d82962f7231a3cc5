#!/usr/bin/env bash
# What a contributor wants on top of `pytest`, about ten minutes on two cores; .ci/run runs it too,
# without the long part that PAE_LONG=1 asks for:
#
#     pip install -e ".[dev]" && tests/more.sh
#
# Style; property tests on fresh examples; and the tests that compare numbers once more on what
# other processors have: AVX2 alone, AVX-512 without its later parts, no vector instructions in
# PyTorch's own loops, two threads. The CPU kernels also run as aarch64 code in every `pytest` where
# `apt-get install g++-aarch64-linux-gnu qemu-user-static` was done.
#
# The long part, longer than that: the interpreter's attention on both backwards in every case;
# machine code of all that steps, benchmarks and tests launch on
# a GPU; the three stages of bench/gpu.sh on a CPU that stands for one, killed and gone on with; where
# Ray is installed, a sweep on a cluster whose worker and driver are killed; and, where PAE_TTIR is
# an environment with ttsem (tests/kernels/ttir.py says how it is made), every Triton kernel in bf16
# executed from its TTIR. A last argument or more goes to each pytest, as `-x`.
set -euo pipefail
cd "$(dirname "$0")/.."
numbers=(tests/pae tests/kernels/attention tests/kernels/test_pointwise.py
  tests/kernels/test_adaptive.py tests/kernels/koopman tests/kernels/spectrum)
# of the library, on the slowest loops, those that compare engines and released numbers
portable=(tests/pae/test_{engine,families,golden*,kinds_16_bits,kld,mpa*,random_models}.py
  tests/pae/test_{swin,timm_kinds,trained_backbone,vapt}.py)
# Triton's interpreter computes with numpy, and the emulation of a GPU on its own; who takes what,
# and in which words the rest is refused, is the same on all processors
here=(-q -k "not interpreter and not emulated" --ignore=tests/pae/test_combinations.py
  --ignore=tests/pae/test_adapters.py)

say() { printf '\n== %s\n' "$*"; "$@"; }
say ruff format --check .
say ruff check .
mapfile -t properties < <(grep -rl --include='test_*.py' '@examples(' tests)
say pytest -q --fresh "${properties[@]}" "$@"
say env ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2 PAE_CPU_ISA=avx2 \
  pytest "${here[@]}" "${numbers[@]}" "$@"
say env ONEDNN_MAX_CPU_ISA=AVX512_CORE ATEN_CPU_CAPABILITY=default PAE_CPU_ISA=portable \
  pytest "${here[@]}" "${portable[@]}" "${numbers[@]:1}" "$@"
# threads of two processes would spin while they wait for the same two cores
say env PAE_TEST_THREADS=2 OMP_NUM_THREADS=2 pytest -n0 "${here[@]}" tests/pae/test_engine.py \
  tests/pae/test_families.py tests/pae/test_kld.py tests/pae/test_vapt.py "${numbers[@]:1:3}" "$@"
[ -n "${PAE_LONG:-}" ] || exit 0
say python -m tests.gate
say python -m tests.gate --tests
say python -m tests.gate_cuda
say pytest -q tests/kernels/test_triton_compile.py tests/kernels/test_gate.py -k "product or found or ((variants or budget) and attention)" "$@"
say pytest -q tests/kernels/test_triton_interpreter.py -k attention "$@"  # on both backwards
say env OMP_NUM_THREADS=1 pytest -n0 -q tests/bench/gpu_day.py "$@"
if python -c "import ray" 2>/dev/null; then  # a worker and the driver killed, on two CPUs
  say env OMP_NUM_THREADS=1 PAE_RAY=1 pytest -n0 -q tests/sweep/test_on_ray.py "$@"
else
  say echo "left out: sweeps on a Ray cluster: pip install pae[sweep]"
fi
if [ -n "${PAE_TTIR:-}" ]; then
  say env OMP_NUM_THREADS=1 "$PAE_TTIR/bin/python" -m pytest -n0 -q tests/kernels/ttir.py "$@"
else
  say echo "left out: tests/kernels/ttir.py, whose environment PAE_TTIR does not name"
fi
