"""Checkpoints: the trained parts alone, in one safetensors file that knows which backbone it
belongs to, what it was trained for, and whether it is still what was written.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from . import prompts
from .backbones import BackboneView, head_name
from .backbones.facts import are_facts, difference, facts_of
from .backbones.trained import names, release
from .choices import POOLS
from .errors import CheckpointError, UnsupportedBackbone, one_line
from .files import TEMPORARY as TEMPORARY
from .files import from_json, to_json
from .files import remove_temporaries as remove_temporaries
from .files import write_atomically as write_atomically
from .kld import KLD
from .task import TaskInfo
from .tensorfile import DIGEST, fitted, not_finite, read_tensors, require_digest, write_tensors
from .version import __version__

FORMAT = "pae-2"
_FORMER = "pae-1"  # of version 0.1: no digest, and one fingerprint for weights and positions
_TEXT = "pae"  # the name of the description among the texts of the file


@dataclass(frozen=True)
class Checkpoint:
    """What a file that `PromptedViT.save` wrote holds.

    Attributes:
        path: the file.
        format: "pae-2", or "pae-1" of version 0.1, which does not say what is None here.
        backbone: name of the architecture, and timm's tag where there is one.
        fingerprint: of the backbone's weights; see `pae.checkpoint.fingerprint`. Here and in
            `positions` without what is trained of it.
        positions: fingerprint of the position embedding; None: not known.
        image_size: (height, width) that the backbone was built for; None: not known.
        facts: what it computes that no weight says, see `pae.backbones.facts`; empty where the file
            is older than that.
        num_classes: number of logits; 0 when the head is no linear layer.
        prompts: {"name": class of the family, "config": its arguments}.
        kld: the arguments of `pae.KLD`, or None when there is none.
        pool: whose rows the readout pooled, as in `PromptedViT`; "image" where the file is older
            than that.
        task: what the model was trained for, or None.
        dense: of a `PromptedSegmenter` what `DenseHeads.describe` says; None of all others.
        train_backbone: what of the backbone is trained, as `PromptedViT.trained_backbone` says it.
        versions: of pae, torch and timm, which wrote it.
        extra: the further texts given to `save`.
        state: the trained tensors by name, on the CPU.
    """

    path: Path
    format: str
    backbone: str
    fingerprint: str
    positions: str | None
    image_size: tuple[int, int] | None
    facts: dict[str, Any]
    num_classes: int
    prompts: dict[str, Any]
    kld: dict[str, Any] | None
    pool: str
    task: TaskInfo | None
    dense: dict[str, Any] | None
    train_backbone: tuple[str, ...]
    versions: dict[str, str]
    extra: dict[str, str]
    state: dict[str, Tensor]


class Fillable(Protocol):
    """What takes the tensors of a checkpoint."""

    def trained_state(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any: ...


class Trained(Fillable, Protocol):
    """What a checkpoint reads and writes of a `PromptedViT`."""

    backbone: nn.Module
    view: BackboneView
    prompts: prompts.PromptFamily
    kld: KLD | None
    pool: str
    task: TaskInfo | None
    trained_backbone: tuple[str, ...]
    head: nn.Module

    @property
    def num_classes(self) -> int: ...


_Model = TypeVar("_Model", bound=Trained)


# ---- which backbone


def fingerprint(backbone: nn.Module, trained: Collection[str] = ()) -> str:
    """Hash of a backbone's weights, head and position embedding apart; the same for its fp32 and
    its bf16 copy, on any device and at any image size. `trained`: names that are left out.
    """
    return _hash(backbone, lambda name: not _is_position(name) and name not in trained)


def position_fingerprint(backbone: nn.Module, trained: Collection[str] = ()) -> str:
    """Hash of its position embedding, which is another one at another image size."""
    return _hash(backbone, lambda name: _is_position(name) and name not in trained)


def _former_fingerprint(backbone: nn.Module) -> str:
    return _hash(backbone, lambda name: True)


# what the libraries call a table of positions
_POSITIONS = ["pos_embed", "pos_embedding", "positional_embedding", "position_embeddings"]
_POSITIONS += ["position_embedding.weight"]


def _is_position(name: str) -> bool:
    return f".{name}".endswith(tuple(f".{position}" for position in _POSITIONS))


def _hash(backbone: nn.Module, counts: Callable[[str], bool]) -> str:
    digest, head = hashlib.blake2b(digest_size=16), f"{head_name(backbone)}."
    for name, tensor in sorted(backbone.state_dict().items()):
        if name.startswith(head) or not counts(name):
            continue
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        rounded = tensor.detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(rounded.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def backbone_name(backbone: nn.Module) -> str:
    """timm's architecture name where the model carries one, else the class name."""
    config = (
        getattr(backbone, "pretrained_cfg", None) or getattr(backbone, "default_cfg", None) or {}
    )
    get = (
        config.get
        if isinstance(config, Mapping)
        else lambda key, default=None: getattr(config, key, default)
    )
    name = get("architecture", None)
    if not name:
        return type(backbone).__name__
    return f"{name}.{get('tag', None)}" if get("tag", None) else name


def _source(backbone: nn.Module) -> str | None:
    """hf:NAME of a model of transformers that came from the hub; the others say it by name."""
    name = getattr(getattr(backbone, "config", None), "_name_or_path", "")
    is_theirs = any(c.__module__.startswith("transformers.") for c in type(backbone).__mro__)
    # a folder of this machine says nothing elsewhere
    return f"hf:{name}" if is_theirs and name and not Path(name).exists() else None


def _image_size(backbone: nn.Module) -> tuple[int, int] | None:
    """(height, width) that the stem was built for."""
    size = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
    return None if size is None else (int(size[0]), int(size[1]))


def identity(backbone: nn.Module, trained: Collection[str] = ()) -> dict[str, str]:
    """What a file knows of a frozen module: its name and both fingerprints."""
    return {
        "backbone": backbone_name(backbone),
        "fingerprint": fingerprint(backbone, trained),
        "positions": position_fingerprint(backbone, trained),
    }


# ---- writing


def versions() -> dict[str, str]:
    """Of what writes a file."""
    import timm

    return {"pae": __version__, "torch": torch.__version__, "timm": timm.__version__}


def finite(path: str | Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state`, or ValueError where the file could not be loaded again."""
    for name, tensor in state.items():
        if bad := not_finite(tensor):
            raise ValueError(
                f"{path}: not written, as {name} holds NaN or infinity in {bad} of "
                f"{tensor.numel()} values"
            )
    return state


def save(
    model: Trained,
    path: str | Path,
    extra: Mapping[str, str] | None = None,
    task: TaskInfo | None = None,
) -> None:
    """See `PromptedViT.save`."""
    task = model.task if task is None else task
    if task is not None and not isinstance(task, TaskInfo):
        raise ValueError(f"task must be a pae.TaskInfo or None, got {type(task).__name__}")
    named = None if task is None else task.classes
    if named is not None and model.num_classes not in (0, len(named)):
        raise ValueError(
            f"task.classes names {len(named)} classes, and the model has {model.num_classes}"
        )
    state = finite(path, model.trained_state())
    trained = names(model.trained_backbone)
    description: dict[str, Any] = {
        "format": FORMAT,
        **identity(model.backbone, trained),
        "image_size": _image_size(model.backbone),
        "facts": facts_of(model.view, trained),
        "num_classes": model.num_classes,
        "prompts": describe_part(model.prompts),
        "kld": None if model.kld is None else model.kld.config(),
        "pool": model.pool,
        "task": None if task is None else task.record(),
        "versions": versions(),
    }
    if model.trained_backbone:
        description["train_backbone"] = list(model.trained_backbone)
    if (source := _source(model.backbone)) is not None:
        description["source"] = source
    if (dense := _dense(model)) is not None:
        description["dense"] = dense
    write_described(path, state, extra, description)


def write_described(
    path: str | Path,
    state: Mapping[str, Tensor],
    extra: Mapping[str, str] | None,
    description: Mapping[str, Any],
) -> None:
    """Tensors, further texts and what they are, with a "format", to one file, atomically.

    Raises:
        ValueError: a name among `extra` that is taken; OSError: it cannot be written.
    """
    if _TEXT in (extra or {}):
        raise ValueError(f"extra: the name {_TEXT!r} is taken by the description of the checkpoint")
    write_tensors(path, state, {**(extra or {}), _TEXT: to_json(description)})


def _dense(model: Trained) -> dict[str, Any] | None:
    """What the heads of a `PromptedSegmenter` are; None of another head."""
    describe = getattr(model.head, "describe", None)
    return None if describe is None else cast(Any, describe)()


# ---- reading


def read_described(
    path: Path, formats: tuple[str, ...], hints: Mapping[str, str] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """Tensors, description and further texts of a file of `write_described`.

    Args:
        formats: those that are read, the present one first. hints: of others, what they are.

    Raises:
        CheckpointError: the file is missing, unreadable, half-written, damaged, or of none of them.
    """
    state, texts, vouched = read_tensors(path)
    try:
        meta = from_json(texts.pop(_TEXT))
        kind = meta["format"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} was not written by pae") from error
    if kind not in formats:
        known = (hints or {}).get(f"{kind}", "")
        raise CheckpointError(
            f"checkpoint {path} has format {kind!r}, expected {formats[0]!r}{known}"
        )
    require_digest(path, vouched, former=kind == _FORMER)
    texts.pop(DIGEST, None)
    return state, meta, texts


def read(path: str | Path) -> Checkpoint:
    """What a file holds that `PromptedViT.save` wrote. No backbone is needed.

    Args:
        path: the file. One of version 0.1, which has no digest, is read with a warning.

    Raises:
        CheckpointError: the file is missing, unreadable, half-written, damaged, or not one of ours.
    """
    path = Path(path)
    state, meta, texts = read_described(path, (FORMAT, _FORMER))
    kind = meta["format"]
    meta.setdefault("pool", "image")
    expected = {**_DESCRIPTION, **(_ADDED if kind == FORMAT else {})}
    meta.setdefault("train_backbone", [])  # said where there is anything
    meta.setdefault("facts", {})
    if missing := [part for part in expected if part not in meta]:
        raise CheckpointError(f"checkpoint {path} does not say its {', '.join(missing)}")
    for part, fits in expected.items():
        if not fits(meta[part]):
            raise CheckpointError(f"checkpoint {path} is damaged: its {part} is {meta[part]!r}")
    try:
        task = TaskInfo.read(meta.get("task"))
    except ValueError as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {one_line(error)}") from error
    size = meta.get("image_size")
    return Checkpoint(
        path=path,
        format=kind,
        backbone=meta["backbone"],
        fingerprint=meta["fingerprint"],
        positions=meta.get("positions"),
        image_size=None if size is None else (size[0], size[1]),
        facts=meta.get("facts", {}),
        num_classes=meta["num_classes"],
        prompts=meta["prompts"],
        kld=meta["kld"],
        pool=meta["pool"],
        task=task,
        dense=meta.get("dense"),
        train_backbone=tuple(meta["train_backbone"]),
        versions=meta.get("versions", {}),
        extra=texts,
        state=state,
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_count, value))


# what a description says, and what each part looks like; a task checks itself
_DESCRIPTION: dict[str, Callable[[Any], bool]] = {
    "backbone": _is_text,
    "fingerprint": _is_text,
    "num_classes": _is_count,
    "prompts": lambda v: (
        isinstance(v, dict) and _is_text(v.get("name")) and isinstance(v.get("config"), dict)
    ),
    "kld": lambda v: v is None or isinstance(v, dict),
    "pool": lambda v: v in POOLS,
    "facts": are_facts,
    "train_backbone": lambda v: isinstance(v, list) and all(map(_is_text, v)),
}
_ADDED: dict[str, Callable[[Any], bool]] = {
    "positions": _is_text,
    "image_size": lambda v: v is None or _is_size(v),
    "task": lambda v: True,
    "versions": lambda v: isinstance(v, dict) and all(map(_is_text, v.values())),
}


def load(model: Trained, path: str | Path, other_size: bool = False) -> None:
    """See `PromptedViT.load`."""
    found = read(path)
    if found.train_backbone != model.trained_backbone:
        raise CheckpointError(
            f"checkpoint {path} trained {_listed(found.train_backbone)} of the backbone, and this "
            f"model trains {_listed(model.trained_backbone)}: build it with the same "
            "train_backbone, or use PromptedViT.from_file"
        )
    _check_backbone(found, model.backbone, other_size)
    _check_facts(found, model)
    if found.dense != (own := _dense(model)):
        raise CheckpointError(
            f"checkpoint {path} holds {_heads(found.dense)}, and this model has {_heads(own)}: "
            "build it with the same, or use PromptedSegmenter.from_file"
        )
    if found.pool != model.pool:
        raise CheckpointError(
            f"checkpoint {path} was trained with pool={found.pool!r}, and the model has "
            f"{model.pool!r}: set model.pool, or build the model with from_file"
        )
    check_part(found.path, "prompts", found.prompts, model.prompts)
    fill(model, found.path, found.state)
    model.task = found.task


def describe_part(part: nn.Module | None) -> dict[str, Any] | None:
    """What a part of a model is, for a reader of its file."""
    if part is None:
        return None
    config: Any = getattr(part, "config", None)
    return {"name": type(part).__name__, "config": config() if callable(config) else None}


def check_part(
    path: Path, role: str, found: Mapping[str, Any] | None, part: nn.Module | None
) -> None:
    """Raise CheckpointError unless `part` is what the file says of its own: tensors of the same
    names and shapes mean something else in another family, or under another argument.

    Of its arguments those count that say what is computed of the tensors, and not those that act
    in training alone (`training_arguments`). What a file does not say is the default.
    """
    own = describe_part(part)
    if own is None or found is None or found["name"] != own["name"]:
        same = own is found is None
        said = {} if same else {role: (_name(found), _name(own))}
    else:
        known = inspect.signature(type(part)).parameters
        defaults = {n: p.default for n, p in known.items() if p.default is not p.empty}
        theirs, mine = (
            {**defaults, **(found["config"] or {})},
            {**defaults, **(own["config"] or {})},
        )
        skip = getattr(type(part), "training_arguments", ())
        pairs = {n: (theirs.get(n), mine.get(n)) for n in {**theirs, **mine} if n not in skip}
        said = {
            f"{own['name']}'s {n}": (repr(a), repr(b))
            for n, (a, b) in pairs.items()
            if not _alike(a, b)
        }
    for what, (theirs_is, mine_is) in said.items():
        raise CheckpointError(
            f"checkpoint {path} was trained with {what} {theirs_is}, and this model has {mine_is}: "
            "build it with the same"
        )


def _name(part: Mapping[str, Any] | None) -> str:
    return "None" if part is None else part["name"]


def _alike(a: Any, b: Any) -> bool:
    """Whether two arguments are one: tuples are lists in a file, and one number of all blocks may
    be written for each of them.
    """
    a, b = (list(v) if isinstance(v, tuple) else v for v in (a, b))
    if isinstance(a, list) and type(b) is int:
        a, b = b, a
    if type(a) is int and isinstance(b, list):
        return len(b) > 0 and all(each == a for each in b)
    return type(a) is type(b) and a == b


def _heads(dense: dict[str, Any] | None) -> str:
    return "a head for features" if dense is None else f"heads for dense prediction {dense}"


def _listed(entries: tuple[str, ...]) -> str:
    more = f" and {len(entries) - 2} more" if len(entries) > 2 else ""
    return ", ".join(entries[:2]) + more if entries else "nothing"


def build(
    cls: Callable[..., _Model], path: str | Path, backbone: nn.Module, other_size: bool = False
) -> _Model:
    """See `PromptedViT.from_file`."""
    if not isinstance(backbone, nn.Module):
        raise TypeError(f"backbone must be a torch.nn.Module, got {type(backbone).__name__}")
    found = read(path)
    if found.dense is not None and isinstance(cls, type):
        raise CheckpointError(
            f"checkpoint {path} holds {_heads(found.dense)}: use PromptedSegmenter.from_file, or "
            "pae.load"
        )
    _check_backbone(found, backbone, other_size)
    try:
        family = prompts.build(found.prompts["name"], found.prompts["config"])
        kld = None if found.kld is None else KLD(**found.kld)
    except Exception as error:  # of another version's arguments; a family may be anybody's
        raise CheckpointError(
            f"checkpoint {path} describes parts this version cannot build: {one_line(error)}"
        ) from error
    own_head = "head.weight" in found.state  # another than a linear layer is the backbone's
    with _untouched_on_failure(backbone):
        try:
            model = cls(
                *(backbone, family, kld),
                num_classes=(found.num_classes or None) if own_head else None,
                pool=found.pool,
                train_backbone=found.train_backbone,
            )
        except (UnsupportedBackbone, torch.OutOfMemoryError):
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"checkpoint {path} does not fit this backbone: {one_line(error)}"
            ) from error
        _check_facts(found, model)
        fill(model, found.path, found.state)
        model.task = found.task
    return model


@contextlib.contextmanager
def _untouched_on_failure(backbone: nn.Module) -> Iterator[None]:
    """Undoes, when the body raises, what `PromptedViT` does to a backbone that it takes over."""
    name = head_name(backbone) or ""
    head = reduce(lambda part, own: getattr(part, own, None), name.split("."), cast(Any, backbone))
    parameters = [(p, p.data, p.requires_grad) for p in backbone.parameters()]
    modes = [(module, module.training) for module in backbone.modules()]
    try:
        yield
    except BaseException:
        if head is not None:
            backbone.set_submodule(name, head)
        for parameter, data, trains in parameters:
            parameter.data = data  # of another dtype, if it was converted
            parameter.requires_grad_(trains)
        release(backbone)
        for module, mode in modes:
            module.training = mode
        raise


def _check_backbone(found: Checkpoint, backbone: nn.Module, other_size: bool) -> None:
    former = found.format == _FORMER
    left_out = names(found.train_backbone)
    own = _former_fingerprint(backbone) if former else fingerprint(backbone, left_out)
    if found.fingerprint != own:
        hint = ""
        if former:
            hint = (
                "; a file of version 0.1 knows its backbone at the image size of training alone: "
                "load it there, and save it again"
            )
        raise CheckpointError(
            f"checkpoint {found.path} was trained on backbone {found.backbone} with fingerprint "
            f"{found.fingerprint}, got {backbone_name(backbone)} with {own}{hint}"
        )
    size = _image_size(backbone)
    positions = position_fingerprint(backbone, left_out)
    same = found.positions == positions and found.image_size == size
    if former or other_size or same:
        return
    if found.image_size is None or found.image_size == size:
        raise CheckpointError(
            f"checkpoint {found.path} was trained on this backbone with another position "
            "embedding (pos_embed); give other_size=True to use it with this one"
        )
    trained, built = (" x ".join(map(str, each or ("?",))) for each in (found.image_size, size))
    raise CheckpointError(
        f"checkpoint {found.path} was trained on this backbone at another image size: {trained}, "
        f"and this one is built for {built}; build it with img_size={_argument(found.image_size)}, "
        "or give other_size=True to use the trained parts at this size"
    )


def _check_facts(found: Checkpoint, model: Trained) -> None:
    if other := difference(found.facts, facts_of(model.view, names(model.trained_backbone))):
        raise CheckpointError(
            f"checkpoint {found.path} was trained on a backbone of these weights with {other}: "
            "build it as it was"
        )


def _argument(size: tuple[int, int]) -> str:
    return str(size[0] if size[0] == size[1] else size)


def fill(model: Fillable, path: Path, state: Mapping[str, Tensor]) -> None:
    """Puts the tensors into the model, all or none."""
    own = model.trained_state()
    new = fitted(path, state, own)
    before = {name: tensor.clone() for name, tensor in own.items()}
    try:
        model.load_state_dict(new, strict=False)  # a backbone is no part of it
    except BaseException as error:
        model.load_state_dict(before, strict=False)
        if not isinstance(error, Exception):
            raise
        raise CheckpointError(
            f"checkpoint {path} does not fit this model: {one_line(error)}"
        ) from error
