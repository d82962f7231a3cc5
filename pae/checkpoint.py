"""Checkpoints: the trained parts alone, in one safetensors file that knows which backbone it
belongs to.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from . import prompts
from .errors import CheckpointError, one_line
from .kld import KLD

FORMAT = "pae-1"
DESCRIPTION = ("backbone", "fingerprint", "num_classes", "prompts", "kld")


class Trained(Protocol):
    """What a checkpoint reads and writes of a `PromptedViT`."""

    backbone: nn.Module
    prompts: prompts.PromptFamily
    kld: KLD | None

    @property
    def num_classes(self) -> int: ...

    def trained_state(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any: ...


_Model = TypeVar("_Model", bound=Trained)


TEMPORARY = ".*.pae-tmp"  # a glob pattern: files that `write_atomically` is still filling


def write_atomically(
    path: str | Path, write: Callable[[Path], object], previous: Path | None = None
) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step.

    A crash at any moment leaves the old file or the new one, never a part; with `previous`, the
    old one under one of its two names.

    Args:
        path: its folder is made when it is missing.
        write: called with the temporary file, which it makes.
        previous: the name that the file at `path` gets when the new one takes its place.

    Raises:
        OSError: naming `path`.
    """
    path = Path(path)
    # only a part of a long name: what is added must not make it longer than a folder takes
    temporary = path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex[:12]}.pae-tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            if previous is not None and os.path.lexists(path):
                os.replace(path, previous)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):  # whatever came before says more
                temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno is None:
            raise OSError(f"{path} cannot be written: {one_line(error)}") from error
        raise OSError(error.errno, error.strerror, str(path)) from error


def _sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk, where the file system can (CIFS, FUSE cannot)."""
    try:
        opened = os.open(folder, os.O_RDONLY)
    except OSError:  # it may be written and not read; on Windows folders cannot be opened
        return
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    finally:
        os.close(opened)


def remove_temporaries(folder: str | Path) -> None:
    """Delete what processes that died have left of files in `folder`.

    Only for a folder in which nobody else writes at the moment.
    """
    for path in Path(folder).glob(TEMPORARY):
        path.unlink(missing_ok=True)


def fingerprint(backbone: nn.Module) -> str:
    """Hash of a backbone's weights, head apart; the same for its fp32 and its bf16 copy, on any
    device.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(backbone.state_dict().items()):
        if name.startswith("head."):
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


def save(model: Trained, path: str | Path, extra: Mapping[str, str] | None = None) -> None:
    """See `PromptedViT.save`."""
    from safetensors.torch import save_file

    meta = {
        "format": FORMAT,
        "backbone": backbone_name(model.backbone),
        "fingerprint": fingerprint(model.backbone),
        "num_classes": model.num_classes,
        "prompts": {"name": type(model.prompts).__name__, "config": model.prompts.config()},
        "kld": None if model.kld is None else model.kld.config(),
    }
    state = {k: v.detach().contiguous() for k, v in model.trained_state().items()}
    metadata = {**(extra or {}), "pae": json.dumps(meta)}
    write_atomically(path, lambda file: save_file(state, file, metadata=metadata))


def read(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and the description of a file that `save` wrote.

    Raises:
        CheckpointError: the file is missing, unreadable, half-written or not one of ours.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            state = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error
    try:
        meta = json.loads(metadata["pae"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} was not written by pae") from error
    if meta.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {meta.get('format')!r}, expected {FORMAT!r}"
        )
    if missing := [part for part in DESCRIPTION if part not in meta]:
        raise CheckpointError(f"checkpoint {path} does not say its {', '.join(missing)}")
    return state, meta


def load(model: Trained, path: str | Path) -> None:
    """See `PromptedViT.load`."""
    state, meta = read(path)
    _check_backbone(path, meta, model.backbone)
    _fill(model, path, state)


def build(cls: Callable[..., _Model], path: str | Path, backbone: nn.Module) -> _Model:
    """See `PromptedViT.from_file`."""
    state, meta = read(path)
    _check_backbone(path, meta, backbone)
    try:
        family = prompts.build(meta["prompts"]["name"], meta["prompts"]["config"])
        kld = None if meta["kld"] is None else KLD(**meta["kld"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {path} describes parts this version cannot build: {error}"
        ) from error
    model = cls(backbone, family, kld, num_classes=meta["num_classes"] or None)
    _fill(model, path, state)
    return model


def _check_backbone(path: str | Path, meta: dict, backbone: nn.Module) -> None:
    found = fingerprint(backbone)
    if meta["fingerprint"] != found:
        raise CheckpointError(
            f"checkpoint {path} was trained on backbone {meta['backbone']} with fingerprint "
            f"{meta['fingerprint']}, got {backbone_name(backbone)} with {found}"
        )


def _fill(model: Trained, path: str | Path, state: dict[str, Tensor]) -> None:
    own = model.trained_state()
    for name in sorted(own.keys() | state.keys()):
        have = tuple(own[name].shape) if name in own else None
        found = tuple(state[name].shape) if name in state else None
        if have != found:
            raise CheckpointError(
                f"checkpoint {path}: {name} is {found} in the file, {have} in the model"
            )
    model.load_state_dict(state, strict=False)  # a backbone is no part of `state`
