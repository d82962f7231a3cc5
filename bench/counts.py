"""What a step does, counted instead of timed: operations, tensors, kernels, floating-point
operations. The same number on every run and on a busy machine.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import timm
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import pae
from pae.backbones import BackboneView
from pae.plan import fold

from . import cost
from .memory import tensors_in
from .peers.vpt import OfficialStyleVPT

IDLE = {
    *("view", "_unsafe_view", "detach", "alias", "lift_fresh", "reshape", "promote_types"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
}

# PyTorch's own fused attention on a CPU, which its counter does not know in 2.11
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda d_out, q, k, v, *_, **__: sdpa_backward_flop_count(d_out, q, k, v)
    ),
}


def flop_counter(formulas: dict[object, Callable] | None = None) -> FlopCounterMode:
    """PyTorch's counter, silent, with further `formulas`."""
    return FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION | (formulas or {}))


class Work(TorchDispatchMode):
    """Counts what PyTorch dispatches in the context; one of pae's ops is one operation.

    Attributes:
        ops: name -> calls of what computes or moves something; views and allocations do not.
        tensors, bytes: memory that operations handed out as fresh results. What a kernel needs for
            itself is not in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.tensors = 0
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if not func.is_view and name not in IDLE:
            self.ops[name] += 1
        given = {_storage(t) for t in tensors_in([*args, kwargs])}
        result = func(*args, **kwargs)
        for t in tensors_in(result):
            if _storage(t) not in given:
                given.add(_storage(t))
                self.tensors += t.untyped_storage().nbytes() > 0
                self.bytes += t.untyped_storage().nbytes()
        return result


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


class _Recorded:
    """Stands in for a Triton kernel: a launch is counted and nothing runs."""

    def __init__(self, kernel, launches: Counter[str]) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid) -> Callable[..., None]:
        return self

    def __call__(self, *args, **kwargs) -> None:
        self._launches[self._kernel.fn.__name__] += 1

    def __getattr__(self, name: str):
        return getattr(self._kernel, name)


@contextmanager
def triton_launches() -> Iterator[Counter[str]]:
    """Kernel name -> launches of what runs in the context on CPU tensors, as a GPU would see them.

    Launching code runs, kernels do not: values are whatever memory held. Needs Triton, no GPU.
    """
    from triton.runtime.jit import JITFunction

    from pae_kernels import backends

    launches: Counter[str] = Counter()
    for versions in backends.registered().values():
        for version in versions:
            if version.name == "triton":
                version.load()
    with patch.dict(os.environ, PAE_BACKEND="triton", TRITON_INTERPRET="1"):
        replaced = [
            (module, name, kernel)
            for path, module in list(sys.modules.items())
            if path.startswith("pae_kernels.")
            for name, kernel in vars(module).items()
            if isinstance(kernel, JITFunction)
        ]
        for module, name, kernel in replaced:
            setattr(module, name, _Recorded(kernel, launches))
        try:
            yield launches
        finally:
            for module, name, kernel in replaced:
                setattr(module, name, kernel)


def counted_flops(
    name: str, prompts: int, batch: int, method: str = "pae", memory: str = "keep", **options
) -> cost.Flops:
    """`bench.cost.flops` as PyTorch's counter sees it, on tensors without values: no product is
    computed and no weight allocated, whatever the size.

    Args:
        name: of a timm model; `options` of `timm.create_model`.
        prompts, batch, method, memory: as `bench.cost.flops` has them.
    """
    with torch.device("meta"):
        vit = timm.create_model(name, **options)
    model = pae.PromptedViT(vit, pae.prompts.VPTDeep(prompts)).train()
    # the quickest without values are tensors on "meta", where neither autocast nor SDPA runs
    mode, device = nullcontext(), "meta"
    if method != "official":
        mode, device = FakeTensorMode(allow_non_fake_inputs=True), "cpu"
    with mode:
        model.to_empty(device=device)
        embed = vit.patch_embed
        images = torch.empty(batch, embed.proj.in_channels, *embed.img_size, device=device)
    forward: Callable[[Tensor], Tensor] = model
    if method == "official":
        forward = OfficialStyleVPT(vit, model.prompts.tokens, model.head)
    elif method == "pae":
        plan = fold(model.view, torch.float32)
        model.plan = lambda dtype=None: plan  # a signature of addresses would find none
        forward = lambda x: pae.fast_forward(model, x, memory=memory)
    # images are looked at before they are used: these have no values
    with mode, patch.object(BackboneView, "check_images"):
        with flop_counter() as ahead:
            logits = forward(images)
        with flop_counter() as back:
            logits.sum().backward()
    return cost.Flops(ahead.get_total_flops(), back.get_total_flops())
