"""What others published for the same tasks and backbone: `published.toml`, with its sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pae.train.declared import parsed

FILE = Path(__file__).with_name("published.toml")
# timm's names of the weights that the papers call ViT-B/16, supervised on ImageNet-21k; those that
# were trained with augmentation ("augreg") are others
_BACKBONES = {"vit_base_patch16_224.orig_in21k": ("vit-b16", "sup-in21k")}
_IMAGE_SIZE = 224


@dataclass(frozen=True)
class Published:
    """One row of a published table, in per cent.

    `overall` is {"groups" | "tasks" | "five": mean} as printed, by this text or by another that has
    the same method.
    """

    method: str
    label: str
    benchmark: str
    tasks: Mapping[str, float]
    overall: Mapping[str, float]
    source: str
    pixels: str
    selection: str | None


@lru_cache
def sources() -> Mapping[str, tuple[str, str]]:
    """{name: (title, address)}."""
    return {name: (s["title"], s["url"]) for name, s in parsed(FILE)["source"].items()}


@lru_cache
def results() -> tuple[dict[str, Any], ...]:
    """The entries of the file, as they stand there."""
    return tuple(parsed(FILE)["result"])


def setting(backbone: str, image_size: int | None) -> tuple[str, str] | None:
    """(architecture, pretraining) as the file names them, or None where nothing is published for
    such a backbone at such a size.
    """
    known = next((v for name, v in _BACKBONES.items() if backbone in (name, f"timm/{name}")), None)
    return known if image_size == _IMAGE_SIZE else None


def rows(
    benchmark: str, where: tuple[str, str], methods: Sequence[str] | None = None
) -> list[Published]:
    """The rows of a benchmark with all its tasks, in the order of the file.

    Args:
        benchmark: "vtab1k" or "fgvc".
        where: of `setting`.
        methods: those to take; by default all.
    Raises:
        ValueError: a method of which nothing is published.
    """
    own = [
        result
        for result in results()
        if result["benchmark"] == benchmark and (result["backbone"], result["pretraining"]) == where
    ]
    known = list(dict.fromkeys(result["method"] for result in own if "tasks" in result))
    for method in methods or ():
        if method not in known:
            raise ValueError(f"--published {method}: expected some of {', '.join(known)}")
    overall: dict[str, dict[str, float]] = {}
    for result in own:
        kinds = overall.setdefault(result["method"], {})
        kinds.setdefault(result["overall_kind"], result["overall"])
    return [
        Published(
            **{name: result[name] for name in ("method", "label", "benchmark", "source", "pixels")},
            tasks=result["tasks"],
            overall=overall[result["method"]],
            selection=result.get("selection"),
        )
        for result in own
        if "tasks" in result and result["method"] in (methods or known)
    ]
