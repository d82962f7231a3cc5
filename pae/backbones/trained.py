"""Which parameters of a backbone are trained beside the prompts, by name.

A name is that of `backbone.named_parameters()`. One entry may be a part of a packed projection's
bias: `blocks.0.attn.qkv.bias:kv` is that of keys and values, and the queries' stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from operator import attrgetter

import torch
from torch import Tensor, nn

from .view import UNTRAINED, BackboneView, Linear

# VPT's "prompt+bias"; what DA-VPT+ trains beside its prompts (its queries' biases stay)
PRESETS: Mapping[str, tuple[str, ...]] = {
    "biases": ("*bias",),
    "da-vpt+": (
        "cls_token",
        "blocks.*.norm1.weight",
        "blocks.*.norm1.bias",
        "blocks.*.attn.qkv.bias:kv",
        "blocks.*.attn.proj.bias",
        "blocks.*.norm2.bias",
        "blocks.*.mlp.fc2.bias",
    ),
}


def named(view: BackboneView, asked: str | Iterable[str]) -> tuple[str, ...]:
    """The entries that `asked` stands for, one per parameter, in the backbone's order.

    Args:
        asked: a preset, a name, a pattern (`blocks.*.norm1.*`), or several.

    Raises:
        TypeError: anything but text.
        ValueError: an entry that matches nothing, or a matrix inside a block; two entries for
            different parts of one parameter.
    """
    several = [asked] if isinstance(asked, str) else list(asked)
    if not several:
        return ()
    view.require_one_width("train_backbone")
    own = view.module.named_parameters()
    head = f"{view.head_name}."
    parameters = {name: p for name, p in own if not name.startswith(head)}
    blocks = [view.read_block(i) for i in range(len(view.blocks))]
    packed = {id(w.qkv.bias) for w in blocks if isinstance(w.qkv, Linear)}
    vectors = {id(t) for w in blocks for t in w.trainable()}
    inside = {id(p) for block in view.blocks for p in block.parameters()}
    found: dict[str, str] = {}
    for entry in several:
        if not isinstance(entry, str):
            raise TypeError(f"train_backbone must be text, got {type(entry).__name__}")
        patterns = PRESETS.get(entry, (entry,))
        matched = 0
        for pattern in patterns:
            pattern, _, part = pattern.partition(":")
            if part not in ("", "q", "k", "v", "qk", "qv", "kv"):
                raise ValueError(
                    f"train_backbone {entry!r}: expected q, k, v, qk, qv or kv after :"
                )
            for name in [n for n in parameters if fnmatchcase(n, pattern)]:
                matched += 1
                key = id(parameters[name])
                if key in inside and key not in vectors:
                    raise ValueError(f"train_backbone {entry!r} takes {name}, and {UNTRAINED}")
                if part and key not in packed:
                    raise ValueError(
                        f"train_backbone {entry!r} takes {name}, and only the bias of the packed "
                        "queries, keys and values has parts"
                    )
                if found.setdefault(name, part) != part:
                    raise ValueError(f"train_backbone names {name} twice, with different parts")
        if not matched and entry in PRESETS:
            raise ValueError(
                f"train_backbone {entry!r} names parameters as timm does, and the backbone has "
                "none of these names: give its own"
            )
        if not matched:
            raise ValueError(
                f"train_backbone {entry!r} is neither one of {', '.join(PRESETS)} nor the name of, "
                "or a pattern for, a parameter of the backbone"
            )
    return tuple(f"{n}:{found[n]}" if found[n] else n for n in parameters if n in found)


class _Part:
    """Hook on a packed bias (3 n,): no gradient but of these parts."""

    __torch_unserializable__ = True  # a copy gets its own

    def __init__(self, parts: str) -> None:
        self.parts = parts

    def __call__(self, grad: Tensor) -> Tensor:
        each = zip("qkv", grad.chunk(3))
        return torch.cat([g if part in self.parts else torch.zeros_like(g) for part, g in each])


def hold(backbone: nn.Module, entries: Sequence[str]) -> None:
    """Let parameters of which a part is trained have that part's gradient alone; twice is once.

    The hook belongs to the tensor: it is set again where another took its place (a copy, an
    assigned state).
    """
    for entry in entries:
        name, _, part = entry.partition(":")
        if part:  # which may be another tensor for a while (torch.func.functional_call)
            tensor: Tensor = attrgetter(name)(backbone)
            if tensor.requires_grad and not any(h.parts == part for h in _held(tensor)):
                tensor.register_hook(_Part(part))


def release(backbone: nn.Module) -> None:
    """Undo `hold`, whoever did it."""
    for parameter in backbone.parameters():
        hooks = parameter._backward_hooks or {}
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Part)]:
            del hooks[key]


def _held(tensor: Tensor) -> list[_Part]:
    return [hook for hook in (tensor._backward_hooks or {}).values() if isinstance(hook, _Part)]


def count(backbone: nn.Module, entries: Sequence[str]) -> int:
    """Number of trained values."""
    total = 0
    for entry in entries:
        name, _, part = entry.partition(":")
        size = backbone.get_parameter(name).numel()
        total += size * len(part) // 3 if part else size
    return total


def names(entries: Sequence[str]) -> list[str]:
    """Of the parameters."""
    return [entry.partition(":")[0] for entry in entries]
