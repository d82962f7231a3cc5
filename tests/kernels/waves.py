"""Shows the waves of the spectrum kernels; a file of its own, as the interpreter reads it."""

import triton
import triton.language as tl

from pae_kernels.spectrum import triton as kernels


@triton.jit
def waves_kernel(out, size, BLOCK: tl.constexpr):
    """cos and sin of all frequencies, (2, size)."""
    turns = tl.arange(0, BLOCK)
    cos, sin = kernels._wave(turns, size)
    tl.store(out + turns, cos, mask=turns < size)
    tl.store(out + size + turns, sin, mask=turns < size)
