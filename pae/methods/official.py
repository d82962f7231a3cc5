"""Weights trained with the published code of VPT, PAE, BPT, VFPT and VAPT, into our families."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..foreign import as_tensor, listed, read_weights_file
from ..kld import KLD
from ..model import PromptedViT, check_pool
from ..prompts import (
    DAVPT,
    VAPT,
    BPTDeep,
    BPTShallow,
    PromptFamily,
    ProVPT,
    VFPTDeep,
    VFPTShallow,
    VPTDeep,
    VPTShallow,
)

# What the published code wraps its parameters in; of VPT's own names some begin with "encoder".
_WRAPPERS = re.compile(
    r"^((module|model|enc|transformer|base_encoder|encoder(?!\.(layer|encoder_norm)\.))\.)+"
)
# What files of prompts alone call them.
_ALONE = {"shallow_prompt": "prompt_embeddings", "deep_prompt": "deep_prompt_embeddings"}
# a map of PAE back to the width of the prompts, which enters no loss and no logit
_UNUSED = re.compile(r"^koopman_out\.")
_KLD = re.compile(r"^(koopman_in\.weight|[kl]_(global|layers(\.\d+)?))$")
# what a backbone of the published layout itself has beside its weights
_INSIDE = re.compile(r"^((deep_)?prompt_|koopman_|[kl]_(global|layers))")
_MOST = 12  # names in a message
# how far a weight may be from the model's and still be the same one, rounded
_SAME = 1e-2


@dataclass(frozen=True)
class OfficialParts:
    """What `load_official` did with every key of the file.

    Attributes:
        prompts, kld, head: keys whose values the model now has.
        backbone: those of what `train_backbone` names, which the model now has too.
        compared: frozen backbone weights, found equal to the model's.
        ignored: keys that nothing reads: PAE's unused koopman_out, and its KLD where the model has
            none; with `check_backbone=False` the backbone; entries that are no tensors.
        pool: whose rows the model's readout pools now, as in `PromptedViT`.
    """

    prompts: list[str] = field(default_factory=list)
    kld: list[str] = field(default_factory=list)
    head: list[str] = field(default_factory=list)
    backbone: list[str] = field(default_factory=list)
    compared: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    pool: str = "image"


@torch.no_grad()
def load_official(
    model: PromptedViT,
    state_dict: Mapping[str, Any] | str | Path,
    check_backbone: bool = True,
    pool: str | None = None,
) -> OfficialParts:
    """Copy prompts, KLD and head of a published implementation's state dict into `model`, and what
    is trained of the backbone.

    Everything is checked before anything is written: a failed call leaves the model as it was.

    Names, in front of which any of `module.`, `model.`, `enc.`, `encoder.`,
    `base_encoder.` and `transformer.` may stand; upper and lower case are one:

        VPT, VFPT   prompt_embeddings (1, P, D), deep_prompt_embeddings (depth - 1, P, D); or
                    Prompt_Tokens (depth or 1, P, D); or, in files of prompts alone,
                    shallow_prompt and deep_prompt
        PAE         as VPT, and koopman_in.weight, K_global, L_global or K_layers, L_layers (one
                    tensor, or .0, .1, ...)
        BPT         random_vectors (sets, P, r), conv1x1.weight or conv1x1.0.weight, ...
                    (D, r, 1, 1); conv for conv1x1 as well
        VAPT        prompt_embeddings, deep_prompt_embeddings, deep_prompt_norm.{j},
                    deep_prompt_downsample.{j}, deep_prompt_embeddings_mlp
        head        head.last_layer.weight and .bias, or head.weight and .bias

    Names of VPT's prompts, of VAPT and of the backbone are those the golden vectors carry; those of
    PAE's and BPT's parameters are put together from descriptions of the code, and a file that has
    others is refused with their list.

    Args:
        model: has the family, sizes and options the file was trained with: `VPTDeep`, `VPTShallow`,
            `VFPTDeep`, `VFPTShallow`, `BPTDeep`, `BPTShallow` or `VAPT`; what VPT's "prompt+bias"
            trained of the backbone it names in `train_backbone="biases"`, and gets from the file.
            How DA-VPT's files call their prompts is not known: a `DAVPT` is refused.
        state_dict: names to tensors or arrays of numpy, or a checkpoint with these under "model" or
            "state_dict"; or the path of a file of either, no code of which is run.
        check_backbone: frozen backbone weights in the file, under their published or timm names,
            must be the model's own. False leaves them unread. BPT's code calls the norm behind the
            mean `norm`, VPT's `fc_norm`.
        pool: whose rows were in the mean, which no file says; `model.pool` is set to it. None: on a
            backbone that pools its rows (MAE) "all", the default of the published code, unless the
            model was made for something else than "image"; elsewhere the model's.

    Returns:
        `OfficialParts`: every key of the file, by what became of it. A file of prompts alone has
        no head: it is left as it is, and a warning says so.

    Raises:
        TypeError: `model` is no PromptedViT, or `state_dict` no mapping of names to tensors.
        ValueError: the model's family has no published names, and what the file holds beside a
            backbone; counts that differ between blocks, which the published code cannot have; the
            head is not linear; a `pool` that model and prompts do not have.
        CheckpointError: the file cannot be read; keys missing, unknown or of another shape, all of
            them listed; values that are not finite; or a backbone weight that differs.
    """
    if not isinstance(model, PromptedViT):
        raise TypeError(f"model must be a PromptedViT, got {type(model).__name__}")
    model.view.require_one_width("load_official")
    if pool is None:
        pools = model.pool == "image" and model.view.pools_not is None
        pool = "all" if pools else model.pool
    check_pool(pool, model.view, model.prompts)
    found = _canonical(state_dict)
    head_of = f"{model.view.head_name}."
    own = {
        name: tensor
        for name, tensor in model.backbone.state_dict().items()
        if not name.startswith(head_of) and not _INSIDE.match(_WRAPPERS.sub("", name).lower())
    }
    trained = _trained_values(own, model.trained_backbone)
    given = {name: torch.zeros_like(mask) for name, mask in trained.items()}
    backbone, is_trained, is_given = map(_backbone_targets, (own, trained, given))
    alone = not any(name in backbone or name.startswith("head.") for name in found)
    head = _head_targets(model.head, found)
    targets = {
        "prompts": _prompt_targets(model.prompts, found, backbone),
        "kld": {} if model.kld is None else _kld_targets(model.kld, found),
        "head": {} if alone else head,
    }
    wanted = {name: part for part, names in targets.items() for name in names}
    parts, unknown, shapes, values = OfficialParts(pool=pool), [], [], []
    missing = [name for name in wanted if name not in found]
    differing = []
    for name, (key, tensor) in found.items():
        trains = name in backbone and bool(is_trained[name].any())
        if name in wanted:
            target = targets[wanted[name]][name]
            getattr(parts, wanted[name]).append(key)
        elif trains:
            target = backbone[name]
            is_given[name].fill_(True)
            parts.backbone.append(key)
        elif name in backbone and check_backbone:
            target = backbone[name]
            parts.compared.append(key)
        elif name in backbone or _UNUSED.match(name) or (model.kld is None and _KLD.match(name)):
            parts.ignored.append(key)
            continue
        else:
            unknown.append(key)
            continue
        if _squeezed(tensor) != _squeezed(target):
            shapes.append(f"{key} is {tuple(tensor.shape)} for {tuple(target.shape)}")
            continue
        if name in wanted or trains:
            if not tensor.is_floating_point():
                values.append(f"{key} is {tensor.dtype}")
                continue
            if not torch.isfinite(tensor.to(target.dtype)).all():
                values.append(f"{key} has NaN or infinite values")
        if name in backbone and check_backbone:
            kept = ~is_trained[name] if trains else ...
            size = _difference(tensor.reshape(target.shape)[kept], target[kept])
            if not size <= _SAME:
                differing.append(f"{key} ({size:.1e})")
    missing += [name for name, mask in trained.items() if (mask & ~given[name]).any()]

    problems = [
        f"{what}: {listed(names, _MOST)}"
        for what, names in (
            ("missing", missing),
            ("unknown", unknown),
            ("wrong shape", shapes),
            ("wrong values", values),
        )
        if names
    ]
    if problems:
        family = type(model.prompts).__name__
        raise CheckpointError(f"state_dict does not fit this {family}: {'; '.join(problems)}")
    if differing:
        raise CheckpointError(
            "state_dict was trained on another backbone, relative differences: "
            f"{listed(differing, _MOST)}"
        )
    for part in targets.values():
        for name, target in part.items():
            target.copy_(found[name][1].reshape(target.shape))
    for name, (_, tensor) in found.items():
        if name in backbone and name not in wanted and (mask := is_trained[name]).any():
            target = backbone[name]
            target.copy_(torch.where(mask, tensor.reshape(target.shape).to(target), target))
    model.pool = pool
    if alone:
        warnings.warn(
            "state_dict holds prompts alone: the head is left as it is, and which backbone they "
            "were trained on is not known",
            stacklevel=3,  # of who called, past no_grad
        )
    return parts


def _canonical(source: Mapping[str, Any] | str | Path) -> dict[str, tuple[str, Tensor]]:
    """Names without wrappers, in lower case -> (the key itself, its tensor)."""
    state: object = source
    if isinstance(source, (str, Path)):
        state = read_weights_file(source)
    if not isinstance(state, Mapping):
        raise TypeError(f"state_dict must be a mapping, got {type(state).__name__}")
    for outer in ("model", "state_dict"):
        inner: object = state.get(outer)
        if isinstance(inner, Mapping):
            state = inner
    head: object = state.get("head")
    if isinstance(head, Mapping):  # a state dict of its own, where prompts are one tensor
        state = {k: v for k, v in state.items() if k != "head"}
        state |= {f"head.{name}": value for name, value in head.items()}
    found: dict[str, tuple[str, Tensor]] = {}
    for key, value in state.items():
        tensor = as_tensor(value)
        if not isinstance(key, str) or tensor is None:
            raise TypeError(
                f"state_dict must map names to tensors, got {type(value).__name__} at {key!r}"
            )
        name = _WRAPPERS.sub("", key).lower()
        name = _ALONE.get(name, name)
        if name.startswith("conv."):
            name = name.replace("conv.", "conv1x1.", 1)
        if name in found:
            raise CheckpointError(f"state_dict holds {name} twice: {found[name][0]} and {key}")
        found[name] = key, tensor
    return found


# ---- what each family's parameters are called; values are views of ours, to be written


def _prompt_targets(
    family: PromptFamily, found: Mapping, backbone: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    # DA-VPT and PRO-VPT are kinds of VPT-deep, whose names their files need not have
    if not isinstance(family, (DAVPT, ProVPT)):
        for kinds, targets in _FAMILIES.items():
            if isinstance(family, kinds):
                return targets(family, found)
    rest = [
        f"{key} {tuple(tensor.shape)}"
        for name, (key, tensor) in found.items()
        if name not in backbone and not name.startswith("head.")
    ]
    raise ValueError(
        f"model.prompts ({type(family).__name__}) has no published names known here, expected one "
        f"of {[kind.__name__ for kinds in _FAMILIES for kind in kinds]}; beside backbone and head "
        f"the file holds {listed(rest, _MOST) or 'nothing'}"
    )


def _deep_tokens(family: VPTDeep, found: Mapping) -> dict[str, Tensor]:
    if family.tokens.dim() != 3:
        raise ValueError(
            "model.prompts must have one count for all blocks to take published weights, got "
            f"{family.prompt_counts}"
        )
    if "prompt_tokens" in found:
        return {"prompt_tokens": family.tokens}
    return _nonempty(
        {"prompt_embeddings": family.tokens[:1], "deep_prompt_embeddings": family.tokens[1:]}
    )


def _shallow_tokens(family: VPTShallow, found: Mapping) -> dict[str, Tensor]:
    name = "prompt_tokens" if "prompt_tokens" in found else "prompt_embeddings"
    return _nonempty({name: family.tokens})


def _factors(family: BPTDeep | BPTShallow, found: Mapping) -> dict[str, Tensor]:
    bases = [b for part in (family.frozen_basis, family.basis) if part is not None for b in part]
    if len(bases) == 1 and "conv1x1.0.weight" not in found:
        return {"random_vectors": family.coefficients, "conv1x1.weight": bases[0]}
    return {
        "random_vectors": family.coefficients,
        **{f"conv1x1.{i}.weight": basis for i, basis in enumerate(bases)},
    }


def _adaptive(family: VAPT, found: Mapping) -> dict[str, Tensor]:
    targets: dict[str, Tensor] = {
        "prompt_embeddings": family.tokens[:1],
        "deep_prompt_embeddings": family.tokens[1:],
    }
    mixers = cast(Iterable[Any], family.mixers)
    bottlenecks = cast(Iterable[Any], family.bottlenecks)
    for j, mixer in enumerate(mixers):
        targets[f"deep_prompt_norm.{j}.weight"] = mixer.gain
        targets[f"deep_prompt_norm.{j}.bias"] = mixer.offset
        linear = f"deep_prompt_downsample.{j}"
        if mixer.kernel is not None:
            targets[f"{linear}.conv.kernel"] = mixer.kernel
        if mixer.kernel is not None or f"{linear}.linear.weight" in found:
            linear += ".linear"
        targets[f"{linear}.weight"] = mixer.weight
        targets[f"{linear}.bias"] = mixer.bias
    for j, pair in enumerate(bottlenecks):
        own = "deep_prompt_embeddings_mlp" + ("" if family.share_bottleneck else f".{j}")
        targets[f"{own}.block.0.weight"] = pair.down
        targets[f"{own}.block.2.weight"] = pair.up
        if pair.scale is not None:
            targets[f"{own}.scale"] = pair.scale
    return _nonempty(targets)


_FAMILIES: dict[tuple[type, ...], Callable[..., dict[str, Tensor]]] = {
    (VPTDeep, VFPTDeep): _deep_tokens,
    (VPTShallow, VFPTShallow): _shallow_tokens,
    (BPTDeep, BPTShallow): _factors,
    (VAPT,): _adaptive,
}


def _kld_targets(kld: KLD, found: Mapping) -> dict[str, Tensor]:
    targets: dict[str, Tensor] = {"koopman_in.weight": kld.lift.weight}
    for letter, parameter in (("k", kld.K), ("l", kld.L)):
        if kld.mode == "global":
            targets[f"{letter}_global"] = parameter
        elif f"{letter}_layers" in found:
            targets[f"{letter}_layers"] = parameter
        else:
            targets |= {f"{letter}_layers.{j}": p for j, p in enumerate(parameter)}
    return targets


def _head_targets(head: nn.Module, found: Mapping) -> dict[str, Tensor]:
    if not isinstance(head, nn.Linear):
        raise ValueError(f"model.head must be linear, got {type(head).__name__}")
    own = "head" if "head.weight" in found else "head.last_layer"
    return {f"{own}.{name}": parameter for name, parameter in head.named_parameters()}


def _backbone_targets(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Views of a backbone's tensors, under timm's names and under those of VPT and its
    descendants.
    """
    targets = {_WRAPPERS.sub("", name).lower(): tensor for name, tensor in own.items()}
    for pattern, replacement in _PUBLISHED:
        for name, tensor in own.items():
            if re.fullmatch(pattern, name):
                targets[re.sub(pattern, replacement, name)] = tensor
    for name, tensor in own.items():
        if match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name):
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3)):
                targets[f"encoder.layer.{match[1]}.attn.{part}.{match[2]}"] = rows
    for part in ("weight", "bias"):
        if f"fc_norm.{part}" in targets:
            targets.setdefault(f"norm.{part}", targets[f"fc_norm.{part}"])
    return targets


def _trained_values(own: Mapping[str, Tensor], entries: Iterable[str]) -> dict[str, Tensor]:
    """Of each of these tensors, which values are trained."""
    masks = {k: torch.zeros_like(v, dtype=torch.bool) for k, v in own.items()}
    for entry in entries:
        name, _, parts = entry.partition(":")
        for part, rows in zip("qkv", masks[name].chunk(3)) if parts else [("", masks[name])]:
            if part in parts:
                rows.fill_(True)
    return masks


_PUBLISHED = (
    (r"cls_token", "embeddings.cls_token"),
    (r"pos_embed", "embeddings.position_embeddings"),
    (r"patch_embed\.proj\.(\w+)", r"embeddings.patch_embeddings.\1"),
    (r"blocks\.(\d+)\.norm1\.(\w+)", r"encoder.layer.\1.attention_norm.\2"),
    (r"blocks\.(\d+)\.norm2\.(\w+)", r"encoder.layer.\1.ffn_norm.\2"),
    (r"blocks\.(\d+)\.mlp\.(fc\d)\.(\w+)", r"encoder.layer.\1.ffn.\2.\3"),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"encoder.layer.\1.attn.out.\2"),
    (r"norm\.(\w+)", r"encoder.encoder_norm.\1"),
)


# ---- shapes, sizes, lists


def _nonempty(targets: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: target for name, target in targets.items() if target.numel()}


def _squeezed(tensor: Tensor) -> list[int]:
    """Sizes other than 1: a convolution of one pixel is a matrix, a set of one is its member."""
    return [size for size in tensor.shape if size != 1]


def _difference(tensor: Tensor, target: Tensor) -> float:
    """Norm of the difference, relative to the norm of `target`; tiny ones count as equal."""
    a, b = tensor.to(target.device).double().flatten(), target.double().flatten()
    return ((a - b).norm() / (b.norm() + 1e-6)).item()
