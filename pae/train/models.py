"""Which models are accepted, by which engine, and why not: `pae models`, and a table in the docs.

Models of timm are built without weights, two blocks deep where they can be, and asked. Of the other
libraries the readers say what they read; nothing of those is imported.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import nn

ENGINES = ("fast", "reference", "none")


class Row(NamedTuple):
    """One model: its name, "fast" (both engines), "reference" (that alone) or "none", and why."""

    name: str
    engine: str
    why: str = ""


def survey(pattern: str = "*", pretrained: bool = False) -> Iterator[Row]:
    """A row per model whose name, or part of a name, matches: timm's architectures, or their
    pretrained tags, and the classes of the other libraries.

    Args:
        pattern: as of file names; without * or ? it may stand anywhere in the name. Or one model
            of transformers or open_clip by its name, e.g. hf:facebook/dinov2-base.

    Raises:
        ValueError: there is no such model.
    """
    import timm

    from pae.backbones import named

    if named.is_named(pattern):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield Row(pattern, *_asked(named.load_named(pattern, pretrained=False, skeleton=True)))
        return

    if not any(sign in pattern for sign in "*?["):
        pattern = f"*{pattern}*"
    seen: dict[str, Row] = {}
    for name in timm.list_models(pretrained=pretrained):
        if fnmatchcase(name, pattern):
            architecture = name.partition(".")[0]
            if architecture not in seen:
                seen[architecture] = asked(architecture)
            yield seen[architecture]._replace(name=name)
    yield from (row for row in _others() if fnmatchcase(row.name.lower(), pattern.lower()))


def asked(architecture: str) -> Row:
    """What becomes of one architecture of timm."""
    import timm

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = timm.create_model(architecture, depth=2)
        except Exception:  # a constructor without the argument, or with needs that two blocks miss
            try:
                model = timm.create_model(architecture)
            except Exception as error:  # anything that a constructor of timm may raise
                return Row(architecture, "none", f"timm cannot build it: {_line(error)}")
        return Row(architecture, *_asked(model))


def _asked(model: nn.Module) -> tuple[str, str]:
    from pae.errors import UnsupportedBackbone
    from pae.model import PromptedViT
    from pae.prompts import VPTDeep

    try:
        made = PromptedViT(model, VPTDeep(1), num_classes=2)
    except (UnsupportedBackbone, ValueError) as error:
        return "none", _line(error)
    if made.view.unproved is not None:
        return "reference", _line(UnsupportedBackbone(made.view.unproved))
    try:
        made.plan(torch.float32)  # autocast knows no meta device
    except UnsupportedBackbone as error:
        return "reference", _line(error)
    return "fast", ""


def _others() -> Iterator[Row]:
    from pae.backbones import hf, open_clip, torchvision

    for reader in (hf, open_clip, torchvision):
        yield from (Row(f"{reader.LIBRARY}.{name}", "fast") for name in reader.KINDS)
        yield from (Row(f"{reader.LIBRARY}.{n}", "none", step) for n, step in reader.STEPS.items())
    yield Row("released VPT and PAE code", "fast", "pae.adopt shares its prompts and head")


def _line(error: BaseException) -> str:
    line = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r'; use engine="reference".*$', "", line)


def summary(rows: list[Row]) -> str:
    counts = {engine: sum(row.engine == engine for row in rows) for engine in ENGINES}
    return (
        f"{len(rows)} models: {counts['fast']} in both engines, {counts['reference']} in the "
        f"reference alone, {counts['none']} not"
    )
