"""Which parameters of a backbone are trained beside the prompts, by name.

A name is that of `backbone.named_parameters()`. One entry may be a part of a packed projection's
bias: `blocks.0.attn.qkv.bias:kv` is that of keys and values, and the queries' stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from operator import attrgetter

import torch
from torch import Tensor, nn

from .view import UNTRAINED, BackboneView, Linear

Entry = tuple[str, str]  # name, and the part of a packed bias that is meant, or ""


def _biases(view: BackboneView, names: dict[int, str]) -> list[Entry]:
    """VPT's "prompt+bias"."""
    return [(name, "") for name in names.values() if name.endswith("bias")]


def _da_vpt_plus(view: BackboneView, names: dict[int, str]) -> list[Entry]:
    """What DA-VPT+ trains beside its prompts: the class token, the first norms, the biases of keys,
    values, proj, second norms and fc2 (of the queries' alone not).
    """
    found: list[Entry] = []
    buffers = {id(t) for t in view.module.buffers()}

    def take(role: str, tensor: Tensor | None, part: str = "") -> None:
        if tensor is not None and id(tensor) in names:
            found.append((names[id(tensor)], part))
        elif tensor is not None and id(tensor) not in buffers:  # a bias that is always zero
            raise ValueError(f"train_backbone 'da-vpt+' trains {role}, which is no parameter here")

    take("the class token", view.class_token)
    for i in range(len(view.blocks)):
        w, at = view.read_block(i), f"blocks.{i}"
        if w.norm1 is None or w.norm2 is None:
            raise ValueError(
                f"train_backbone 'da-vpt+' trains norms in front of attention and MLP, and {at} "
                "has them elsewhere"
            )
        take(f"the first norm of {at}", w.norm1.weight)
        take(f"the first norm of {at}", w.norm1.bias)
        if isinstance(w.qkv, Linear):
            take(f"the bias of keys and values of {at}", w.qkv.bias, "kv")
        else:
            for part in w.qkv.parts[len(w.qkv.parts) // 3 :]:
                take(f"the biases of keys and values of {at}", part.bias)
        for product in (w.proj, w.fc2):
            take(f"the biases behind attention and MLP of {at}", product.bias)
        take(f"the second norm of {at}", w.norm2.bias)
    return found


# what a name of several parameters stands for
PRESETS: Mapping[str, Callable[[BackboneView, dict[int, str]], list[Entry]]] = {
    "biases": _biases,
    "da-vpt+": _da_vpt_plus,
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
        for name, part in _meant(entry, view, parameters):
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
    return tuple(f"{n}:{found[n]}" if found[n] else n for n in parameters if n in found)


def _meant(entry: str, view: BackboneView, parameters: dict[str, nn.Parameter]) -> list[Entry]:
    """Of one preset, name or pattern."""
    if entry in PRESETS:
        matched = PRESETS[entry](view, {id(p): name for name, p in parameters.items()})
        if not matched:
            raise ValueError(f"train_backbone {entry!r}: the backbone has nothing of that")
        return matched
    pattern, _, part = entry.partition(":")
    if part not in ("", "q", "k", "v", "qk", "qv", "kv"):
        raise ValueError(f"train_backbone {entry!r}: expected q, k, v, qk, qv or kv after :")
    matched = [(name, part) for name in parameters if fnmatchcase(name, pattern)]
    if not matched:
        raise ValueError(
            f"train_backbone {entry!r} is neither one of {', '.join(PRESETS)} nor the name of, "
            "or a pattern for, a parameter of the backbone"
        )
    return matched


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
