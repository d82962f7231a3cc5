"""What a trained model needs, beside its weights, to be used on images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class TaskInfo:
    """What a model was trained for: `PromptedViT.task`, kept in every checkpoint.

    The fields from `input_size` to `crop_mode` are those of timm's data configuration, by name:
    `timm.data.create_transform(**task.transform())` is the transform of evaluation. None stands for
    what is not known.

    Args:
        classes: names of the classes, in the order of the logits.
        input_size: (channels, height, width) of the images that enter the model.
        mean, std: per channel, on the 0..1 scale.
        interpolation: of the resize, by PIL's name, e.g. "bicubic"; or "tf1-bilinear", which timm
            does not have (`pae.train.pixels.make_transform` has it).
        crop_pct: share of the resized image's side that is kept.
        crop_mode: "squash" (resized to the size whatever its shape), "center" (short side resized,
            centre kept) or "border" (long side resized, border filled).
        integer_white, real_white: the values that were white in grey images of more than 8 bits,
            integers and reals, for `pae.train.images.Ranges`; None where there were none.
        backbone: how the backbone is built again: options of `pae train` by name, of which "model"
            is needed, e.g. {"model": "vit_base_patch16_224.augreg_in21k", "img_size": 224}; it may
            be "hf:NAME" (with "class": of transformers) or "open_clip:ARCHITECTURE/TAG" too.
            Files are there by their names, without the folders that they lay in.

    Raises:
        ValueError: a field of another type, or without sense.
    """

    classes: tuple[str, ...] | None = None
    input_size: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None
    crop_mode: str | None = None
    integer_white: int | None = None
    real_white: float | None = None
    backbone: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("classes", "input_size", "mean", "std"):  # lists, as JSON has them, too
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        checks: dict[str, tuple[Any, str]] = {
            "classes": (lambda v: _all(v, str), "names"),
            "input_size": (
                lambda v: _all(v, int) and len(v) == 3 and min(v) > 0,
                "three positive integers",
            ),
            "mean": (lambda v: _all(v, float), "numbers"),
            "std": (lambda v: _all(v, float) and min(v) > 0, "positive numbers"),
            "interpolation": (lambda v: isinstance(v, str), "a text"),
            "crop_pct": (lambda v: _all((v,), float) and v > 0, "a positive number"),
            "crop_mode": (lambda v: v in _CROP_MODES, f"one of {', '.join(_CROP_MODES)}"),
            "integer_white": (lambda v: _all((v,), int) and v > 0, "a positive integer"),
            "real_white": (lambda v: _all((v,), float) and v > 0, "a positive number"),
            "backbone": (_is_recipe, "a table of names and values with a model"),
        }
        for name, (check, expected) in checks.items():
            value = getattr(self, name)
            if value is not None and not check(value):
                raise ValueError(f"task.{name} must be {expected} or None, got {value!r}")
        channels = {len(v) for v in (self.mean, self.std) if v is not None}
        channels |= {self.input_size[0]} if self.input_size else set()
        if len(channels) > 1:
            raise ValueError(
                f"task.mean, task.std and task.input_size must have one number of channels, got "
                f"{self.mean}, {self.std} and {self.input_size}"
            )

    def transform(self) -> dict[str, Any]:
        """Keyword arguments for `timm.data.create_transform`: the known of `input_size`, `mean`,
        `std`, `interpolation`, `crop_pct`, `crop_mode`.
        """
        others = ("classes", "integer_white", "real_white", "backbone")
        return {k: v for k, v in asdict(self).items() if k not in others and v is not None}

    def record(self) -> dict[str, Any]:
        """As JSON holds it; `TaskInfo.read` reads it."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def read(cls, record: Any) -> TaskInfo | None:
        """What `record` gave; None of None. Names that this version does not know are left out.

        Raises:
            ValueError: it is none.
        """
        if record is None:
            return None
        if not isinstance(record, Mapping):
            raise ValueError(f"task must be a table, got {record!r}")
        return cls(**{f.name: record[f.name] for f in fields(cls) if f.name in record})


def _is_recipe(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("model"), str)
        and all(isinstance(name, str) for name in value)
        and all(v is None or type(v) in (str, int, bool) for v in value.values())
    )


_CROP_MODES = ("squash", "center", "border")


def _all(values: Any, kind: type) -> bool:
    """Whether `values` is a tuple of `kind`, not empty; a finite integer is a number too."""
    kinds = (int, float) if kind is float else (kind,)
    return (
        isinstance(values, tuple)
        and len(values) > 0
        and all(type(v) in kinds and (kind is str or math.isfinite(v)) for v in values)
    )
