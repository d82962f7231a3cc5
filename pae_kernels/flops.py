"""What the ops cost, for PyTorch's counter: `torch.utils.flop_counter.FlopCounterMode` sees an op
from outside, whichever version runs inside it, so every op with products has a formula here.

The counter's own rules: products alone, 2 per multiply-add, what a backward forms again included.
A complex multiply-add is 8. Decompositions are left out, as PyTorch leaves out `eigh`; so are the
pointwise ops, which have no product.

Formulas get shapes, in the order of the op's schema. They are registered when the counter is first
imported and not before, since its module imports Triton: a fifth of a second that nobody who counts
nothing should pay.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from math import prod
from typing import Any

import torch

Shape = Sequence[int]

_COUNTER = "torch.utils.flop_counter"
_FORMULAS: dict[str, Callable[..., int]] = {}


def _of(op: str) -> Callable:
    def keep(formula: Callable[..., int]) -> Callable[..., int]:
        _FORMULAS[op] = formula
        return formula

    return keep


def formulas() -> dict[str, Callable[..., int]]:
    """Op name in `torch.ops.pae` -> formula."""
    return dict(_FORMULAS)


@_of("exact_matmul")
def _exact_matmul(a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(a) * b[-1]


@_of("product_activation_fwd")
def _product(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(x) * weight[0]


@_of("product_activation_bwd")
def _product_backward(d: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(d) * weight[1]


@_of("prompt_attention_fwd")
def _attention(
    qkv: Shape,
    kv_prompt: Shape,
    group: Shape | None,
    scale: float,
    class_only: bool,
    log_multiplicity: Shape | None = None,
    bias: Shape | None = None,
    mask: Shape | None = None,
    causal: bool = False,
    **_: Any,
) -> int:
    """Scores and mixture: 2 products of image queries and all keys that they see."""
    return 2 * _attention_product(qkv, kv_prompt[1], class_only, causal)


@_of("prompt_attention_bwd")
def _attention_backward(
    d_out: Shape,
    qkv: Shape,
    kv_prompt: Shape,
    group: Shape | None,
    scale: float,
    class_only: bool,
    log_multiplicity: Shape | None,
    bias: Shape | None,
    mask: Shape | None,
    out: Shape,
    lse: Shape,
    need_qkv: bool,
    causal: bool = False,
    **_: Any,
) -> int:
    """Scores again, dV, dP, dQ, dK; without a gradient of qkv the prompt columns of all but dQ."""
    if need_qkv:
        return 5 * _attention_product(qkv, kv_prompt[1], class_only, causal)
    (batch, tokens), (heads, width) = qkv[:2], qkv[3:]
    return 4 * 2 * batch * (1 if class_only else tokens) * kv_prompt[1] * heads * width


def _attention_product(qkv: Shape, prompts: int, class_only: bool, causal: bool) -> int:
    batch, tokens, _, heads, width = qkv
    rows = 1 if class_only else tokens
    seen = rows * (rows + 1) // 2 if causal else rows * tokens  # pairs of image rows
    return 2 * batch * (rows * prompts + seen) * heads * width


@_of("token_mix_fwd")
def _mix(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(x) * weight[0]


@_of("token_mix_bwd")
def _mix_backward(
    d_u: Shape, x: Shape, weight: Shape, mean: Shape, rstd: Shape, need_x: bool, **_: Any
) -> int:
    """dW; and dx, whose two means come out of the same product."""
    return (2 if need_x else 1) * 2 * prod(x) * weight[0]


@_of("prompt_bottleneck_fwd")
def _bottleneck(
    u: Shape, gain: Shape, shift: Shape, bias: Shape, down: Shape, *_: Any, **__: Any
) -> int:
    return 2 * 2 * prod(u) * down[0]


@_of("prompt_bottleneck_bwd")
def _bottleneck_backward(
    d_out: Shape, u: Shape, gain: Shape, shift: Shape, bias: Shape, down: Shape, *_: Any, **__: Any
) -> int:
    """The hidden rows again and their gradient; those of down, up and g."""
    return 5 * 2 * prod(u) * down[0]


@_of("enlarged_conv_fwd")
def _enlarged_conv(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """Nine products at the small size: behind the enlargement there are scale^2 times more."""
    return 2 * prod(x[:3]) * prod(weight)


@_of("enlarged_conv_bwd")
def _enlarged_conv_backward(
    d_y: Shape, x: Shape, weight: Shape, scale: int, need_x: bool, need_weight: bool, **_: Any
) -> int:
    return (need_x + need_weight) * 2 * prod(x[:3]) * prod(weight)


@_of("koopman_losses_fwd")
def _koopman(
    prompts: Shape, lift: Shape, K: Shape, L: Shape, formulation: str, *_: Any, **__: Any
) -> int:
    """States, their prediction, V of both states of a pair; L^T L of every distinct L."""
    runs, blocks, pairs, count, width, k = _koopman_sizes(prompts, lift)
    distinct = pairs if len(L) == len(prompts) else 1
    gram = 2 * k**3 * distinct if formulation == "code" else 0
    rows = 2 * blocks * count * width * k + 3 * 2 * pairs * count * k * k
    return runs * (rows + gram)


@_of("koopman_losses_bwd")
def _koopman_backward(
    d_consistency: Shape, d_lyapunov: Shape, prompts: Shape, lift: Shape, *_: Any, **__: Any
) -> int:
    """Twice the forward's products: of V's rows and L, of the states and K, of prompts and lift."""
    runs, blocks, pairs, count, width, k = _koopman_sizes(prompts, lift)
    return runs * (2 * 2 * blocks * count * width * k + 2 * 3 * 2 * pairs * count * k * k)


def _koopman_sizes(prompts: Shape, lift: Shape) -> tuple[int, int, int, int, int, int]:
    *runs, blocks, count, width = prompts
    return prod(runs), blocks, max(blocks - 1, 0), count, width, lift[-2]


@_of("shortcut_images_fwd")
def _images(spectrum: Shape, origins: Shape, window: int, **_: Any) -> int:
    """Rows of a box by complex waves, columns by real and imaginary parts apart."""
    batch, channels, height, width = spectrum
    planes = origins[0] * batch * channels * height * window
    return 8 * planes * window + 2 * planes * 2 * width


@_of("shortcut_tokens_fwd")
def _tokens(spectrum: Shape, origins: Shape, window: int, weight: Shape, *_: Any, **__: Any) -> int:
    """Strips, taps, their product, and the turn from patch to patch; see the reference."""
    batch, channels, height, width = spectrum
    dim, (ph, pw) = weight[0], weight[2:]
    lines, inner = batch * (height // ph), channels * ph
    strips = 8 * height * window * window * batch * channels
    taps = 2 * 2 * window * pw * inner * dim
    products = 2 * window * (2 * lines) * (2 * inner) * dim
    turns = 2 * lines * (width // pw) * 2 * window * dim
    return origins[0] * (strips + taps + products + turns)


@_of("shortcut_pool_fwd")
def _pool(tokens: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(tokens)


def _linear(rows: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(rows) * weight[0]


def _packed_linear(rows: Shape, packed: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return _linear(rows, weight)


def register() -> None:
    """Tell `torch.utils.flop_counter` all formulas, and those of products that PyTorch runs by
    oneDNN or with packed weights and does not count; imports it. More than once does no harm.
    """
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    formulas = [(getattr(torch.ops.pae, name), formula) for name, formula in _FORMULAS.items()]
    formulas.append((getattr(torch.ops.mkldnn, "_linear_pointwise", None), _linear))
    formulas.append((getattr(torch.ops.mkl, "_mkl_linear", None), _packed_linear))
    for op, formula in formulas:
        if op is not None and op not in flop_registry:
            register_flop_formula(op)(formula)


class _WhenImported(MetaPathFinder):
    """Finds the counter's module as all others would, and registers once it has run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec: Any = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def run_and_register(module: Any) -> None:
            run(module)
            register()

        spec.loader.exec_module = run_and_register
        return spec


def register_when_imported() -> None:
    """`register`, now if the counter is there already, else right after its import."""
    if _COUNTER in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _WhenImported())
