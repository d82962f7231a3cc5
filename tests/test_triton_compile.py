"""Every shipped kernel and tile compiles for sm_80 and sm_90, without spills where it matters."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from pae_kernels import ahead_of_time
from pae_kernels.attention import triton as attention
from pae_kernels.pointwise import triton as pointwise

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}


@pytest.mark.parametrize("architecture", ahead_of_time.ARCHITECTURES)
@pytest.mark.parametrize("module", (attention, pointwise), ids=("attention", "pointwise"))
def test_resources(module, architecture):
    for launch in module.shipped_launches(architecture):
        used = ahead_of_time.compile_launch(launch, architecture)
        print(f"sm_{architecture} {launch.label}: {used}")
        assert used.shared <= SHARED_BYTES[architecture], launch.label
        if "fp32" not in launch.label:
            # exact fp32 products run outside the tensor cores and may spill
            assert used.spilled == 0 and used.scalar_loads == 0, launch.label
            assert used.tensor_core > 0 or module is pointwise, launch.label
