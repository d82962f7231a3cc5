"""Reads a block attribute by attribute into neutral weights: what a part is, is told by what it
computes and never by what it is called, and a parameter that nobody has read is an error.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from pae_kernels.pointwise import ACTIVATIONS

from ..errors import UnsupportedBackbone
from .view import Linear, Norm, Stacked, random_rows


class BlockReader:
    """Parts of `block`, which errors call `name`. Paths are attributes with dots between them.

    Every method raises UnsupportedBackbone naming what it found and what it expected.
    """

    def __init__(self, block: nn.Module, name: str) -> None:
        self._block, self.name = block, name
        self._read: set[int] = set()

    def get(self, path: str) -> Any:
        """The attribute."""
        part: Any = self._block
        at = self.name
        for attribute in path.split("."):
            if not hasattr(part, attribute):
                kind = type(part).__name__
                raise UnsupportedBackbone(f"{at} ({kind}) has no attribute {attribute!r}")
            part, at = getattr(part, attribute), f"{at}.{attribute}"
        return part

    def has(self, path: str) -> bool:
        """Whether it is there, and neither None nor nn.Identity."""
        part: Any = self._block
        for attribute in path.split("."):
            part = getattr(part, attribute, None)
        return part is not None and not isinstance(part, nn.Identity)

    def tensor(self, path: str) -> Tensor | None:
        """A parameter or buffer, or None where there is none."""
        if not self.has(path):
            return None
        found = self.get(path)
        if not isinstance(found, Tensor):
            raise self._other(path, found, "expected a tensor")
        self._read.add(id(found))
        return found

    def whole(self, path: str) -> Any:
        """A module, all of whose parameters count as read; None where there is none."""
        if not self.has(path):
            return None
        found = self.get(path)
        self._read |= {id(p) for p in found.parameters()}
        return found

    def linear(self, path: str) -> Linear:
        """nn.Linear and nothing derived from it."""
        part = self.get(path)
        if type(part) is not nn.Linear:
            raise self._other(path, part, "expected Linear")
        self._read |= {id(part.weight), id(part.bias)}
        return Linear(part.weight, part.bias)

    def norm(self, path: str) -> Norm:
        """A LayerNorm or an RMSNorm, told by its values on one row."""
        part = self.get(path)
        weight, bias = getattr(part, "weight", None), getattr(part, "bias", None)
        eps = getattr(part, "eps", None)
        if isinstance(part, nn.RMSNorm) and eps is None:  # it takes that of its rows' dtype
            eps = torch.finfo(torch.float32 if weight is None else weight.dtype).eps
        if not isinstance(part, nn.Module) or not isinstance(eps, float):
            raise self._other(path, part, "expected LayerNorm or RMSNorm")
        asked = type(part).forward, eps
        if part not in _NORMS or _NORMS[part][0] != asked:
            _NORMS[part] = asked, _norm_kind(part, weight, bias, eps)
        kind = _NORMS[part][1]
        if kind is None:
            raise self._other(path, part, "expected LayerNorm or RMSNorm")
        self._read |= {id(weight), id(bias)}
        return Norm(weight, bias, float(eps), kind)

    def optional_norm(self, path: str) -> Norm | None:
        """`norm`; None where `has` says that there is none."""
        return self.norm(path) if self.has(path) else None

    def layer_scale(self, path: str) -> Tensor | None:
        """The factors of a LayerScale module, or None for nn.Identity, or for none (timm 0.4)."""
        if not self.has(path):
            return None
        for attribute in ("gamma", "lambda1"):
            if isinstance(getattr(self.get(path), attribute, None), Tensor):
                return self.tensor(f"{path}.{attribute}")
        raise self._other(path, self.get(path), "expected LayerScale")

    def activation(self, path: str) -> str:
        """Key of the activation that a module, or a function, computes, told by its values."""
        part = self.get(path)
        u = torch.linspace(-6, 6, 97, device="cpu")
        with torch.no_grad():
            y = part(u.clone())
        for kind, function in ACTIVATIONS.items():
            if torch.allclose(y, function(u), rtol=1e-6, atol=1e-6):
                return kind
        raise self._other(path, part, f"expected one of {sorted(ACTIVATIONS)}")

    def mlp(self, path: str) -> dict[str, Any]:
        """The fields of `BlockWeights` that an MLP of timm has: plain, or gated in one of the three
        ways that timm stores it.
        """
        found: dict[str, Any] = {"mlp_norm": None, "mlp_pre": None, "gated": True}
        fc1: Linear | Stacked
        if self.has(f"{path}.fc1_g"):
            fc1 = Stacked((self.linear(f"{path}.fc1_g"), self.linear(f"{path}.fc1_x")))
        elif self.has(f"{path}.w0"):  # the norm stands in front
            fc1 = Stacked((self.linear(f"{path}.w0"), self.linear(f"{path}.w1")))
            found["mlp_pre"] = self.optional_norm(f"{path}.norm")
            found["fc2"] = self.linear(f"{path}.w2")
        else:
            fc1 = self.linear(f"{path}.fc1")
            found["gated"] = hasattr(self.get(path), "gate_last")
            if found["gated"] and self.get(f"{path}.gate_last"):
                fc1 = fc1.exchanged()
        if "fc2" not in found:
            found["fc2"] = self.linear(f"{path}.fc2")
            found["mlp_norm"] = self.optional_norm(f"{path}.norm")
        given = sum(len(part.weight) for part in fc1.parts) // (2 if found["gated"] else 1)
        taken = found["fc2"].weight.shape[1]
        if given != taken:
            raise UnsupportedBackbone(
                f"{self.name}.{path}.fc2 reads {taken} features, and {given} come out of the "
                "activation"
            )
        return {**found, "fc1": fc1, "activation": self.activation(f"{path}.act")}

    def close(self) -> None:
        """Raise when the block has a parameter that was not read."""
        for own, parameter in self._block.named_parameters():
            if id(parameter) not in self._read:
                raise UnsupportedBackbone(
                    f"{self.name}.{own} is a parameter of {type(self._block).__name__} that no "
                    "formula here has"
                )

    def _other(self, path: str, part: Any, expected: str) -> UnsupportedBackbone:
        kind = type(part).__name__
        if hasattr(part, "base_layer"):
            return UnsupportedBackbone(
                f"{self.name}.{path} is {kind} of peft, an adapter that is not merged: "
                "merge_and_unload() makes it part of the weights"
            )
        return UnsupportedBackbone(f"{self.name}.{path} is {kind}, {expected}")


# modules that were asked what they compute: it takes longer than to read a block
_NORMS: WeakKeyDictionary[nn.Module, tuple[Any, str | None]] = WeakKeyDictionary()


def _norm_kind(part: Any, weight: Any, bias: Any, eps: float) -> str | None:
    """ "layer" or "rms"; None when the module computes neither."""
    width = len(weight) if isinstance(weight, Tensor) else part.normalized_shape[-1]
    row = random_rows(1, width) + 0.5
    own = {n: t for n, t in (("weight", weight), ("bias", bias)) if isinstance(t, Tensor)}
    plain = {n: torch.full((width,), float(n == "weight"), device="cpu") for n in own}
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            got = functional_call(part, plain, (row,))
    except (RuntimeError, TypeError, ValueError):
        return None
    rms = row * (row.square().mean(-1, keepdim=True) + eps).rsqrt()
    kinds = {"layer": F.layer_norm(row, (width,), eps=eps), "rms": rms}
    if not isinstance(got, Tensor) or got.shape != row.shape:
        return None
    near = [kind for kind, y in kinds.items() if torch.allclose(got, y, rtol=1e-4, atol=1e-5)]
    return near[0] if near else None
