"""Backbones of other libraries than timm by name, with what their images must look like.

`hf:NAME` is a model of Hugging Face's hub, or a folder that `save_pretrained` wrote; `open_clip:`
takes NAME/TAG of `open_clip.list_pretrained()`, hf-hub:NAME or local-dir:FOLDER, and gives the
image tower.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from ..foreign import first_line, listed, read_weights_file
from . import hf
from .weights import tables_of

SOURCES = ("hf", "open_clip")

# of what was pretrained with more around it than a backbone, the class that reads the same weights
_READ_AS = {
    "CLIPModel": "CLIPVisionModel",
    "SiglipModel": "SiglipVisionModel",
    "ViTForMaskedImageModeling": "ViTModel",
    "ViTMAEForPreTraining": "ViTMAEModel",
    "VideoMAEForPreTraining": "VideoMAEForVideoClassification",  # mean and norm, as it is tuned
    "DeiTForMaskedImageModeling": "DeiTModel",
    "DeiTForImageClassificationWithTeacher": "DeiTModel",
    "BeitForMaskedImageModeling": "BeitModel",
    "BeitForSemanticSegmentation": "BeitModel",
    "BeitBackbone": "BeitModel",
    "Dinov2Backbone": "Dinov2Model",
    "Dinov2WithRegistersBackbone": "Dinov2WithRegistersModel",
    "DINOv3ViTBackbone": "DINOv3ViTModel",
}
_RESAMPLES = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # PIL's numbers
_MOST = 4  # names in a message

Say = Callable[[str], None]


def is_named(name: str) -> bool:
    """Whether it begins with one of `SOURCES`."""
    source, colon, place = name.partition(":")
    return source in SOURCES and bool(colon and place)


def load_named(
    name: str,
    *,
    pretrained: bool = True,
    image_size: int | None = None,
    skeleton: bool = False,
    say: Say | None = None,
    kind: str | None = None,
    weights: str | Path | None = None,
    drop_path: float = 0.0,
    backbone_dropout: float = 0.0,
) -> nn.Module:
    """The backbone of that name, in fp32. A classifier of it is the one that its weights were
    published with, and a random one where the file has none: give `PromptedViT` num_classes.

    Where they are known, `pretrained_cfg` of the module says as timm does of its models:
    input_size, mean, std, interpolation, crop_pct, crop_mode; and its architecture.

    Args:
        name: one for which `is_named`.
        pretrained: with weights; without them they are random.
        image_size: side of the images, where the model takes another than its own.
        skeleton: on the meta device, without weights.
        say: told in one line what was not taken of the file, and what was not in it.
        kind: the class in transformers; None: as the weights were published, or the one that reads
            what was pretrained with more around it.
        weights: a file of them, instead of those of that name: a state dict of the same class.
        drop_path, backbone_dropout: rates of what drops blocks, and values of rows, in training
            mode; 0 leaves those of the model as they are.

    Raises:
        ValueError: no such model, one that is not read, weights that lack a part of it, another
            image size than the model takes, a rate that it has no place for.
        CheckpointError: the file of weights cannot be read.
        ImportError: its library is not installed.
    """
    source, _, place = name.partition(":")
    tell = say or (lambda line: None)
    try:
        if source == "hf":
            rates = {"drop_path_rate": drop_path, "hidden_dropout_prob": backbone_dropout}
            model, facts = _from_transformers(
                place, pretrained, skeleton, tell, kind, weights, rates
            )
        else:
            if drop_path or backbone_dropout:
                raise _Refused(
                    f"{'drop_path' if drop_path else 'backbone_dropout'} has no place in the "
                    f"towers of open_clip, {name}: leave it out"
                )
            model, facts = _from_open_clip(place, pretrained, skeleton, weights)
    except (ImportError, CheckpointError, _Refused):
        raise
    except Exception as error:  # the libraries and the hub raise whatever their parts raise
        raise ValueError(f"{name}: {first_line(error)}") from error
    size, patch = facts["input_size"][1:], facts.pop("patch")
    if image_size is not None and (image_size, image_size) != size:
        if not facts["resizes"]:
            raise ValueError(f"{name}: takes images of {size[0]} x {size[1]} alone")
        if any(image_size % p for p in patch):
            raise ValueError(f"{name}: takes images whose side the patch divides, {patch[0]}")
        facts["input_size"] = (facts["input_size"][0], image_size, image_size)
    del facts["resizes"]
    where = Path(place.rpartition(":")[2])  # a folder's place is nobody's business
    tag = where.name if where.exists() else place
    model.pretrained_cfg = {**facts, "architecture": type(model).__name__, "tag": tag}
    return model.float()


def frames_of(name: str) -> int | None:
    """Frames of a clip that the model reads; None for one that reads images, or is not named."""
    source, _, place = name.partition(":")
    if source != "hf":
        return None
    config, _ = _known(place)
    return getattr(config, "num_frames", None)


class _Refused(ValueError):
    """An error that says it all."""


def _library(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is not installed: pip install 'pae[{extra}]'") from error


# ---- transformers


def _known(place: str, kind: str | None = None) -> tuple[Any, str]:
    """The configuration, and the class that reads it, if that is not `kind`."""
    transformers = _library("transformers", "hf")
    if Path(place).exists() and not (Path(place) / "config.json").is_file():
        raise _Refused(
            f"hf:{place}: has no config.json; give the folder that save_pretrained wrote"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(place)
    except Exception as error:  # as above
        raise _Refused(f"hf:{place}: {first_line(error)}") from error
    stated = config.architectures or ["no architecture"]
    kind = kind or _READ_AS.get(stated[0], stated[0])
    if kind not in hf.KINDS:
        step = hf.STEPS.get(kind, f"expected one of {', '.join(hf.KINDS)}")
        raise _Refused(f"hf:{place}: {kind} is no model that can be read: {step}")
    return config, kind


def _from_transformers(
    place: str,
    pretrained: bool,
    skeleton: bool,
    say: Say,
    kind_name: str | None,
    weights: str | Path | None,
    rates: dict[str, float],
) -> tuple[Any, dict[str, Any]]:
    config, name = _known(place, kind_name)
    kind = getattr(_library("transformers", "hf"), name)
    own = config
    if "VisionModel" in name:  # beside a text model
        own = getattr(config, "vision_config", config)
    for attribute, rate in rates.items():
        if rate and not hasattr(own, attribute):
            option = "drop_path" if attribute == "drop_path_rate" else "backbone_dropout"
            raise _Refused(
                f"{option} has no place in {name} of transformers, hf:{place}: leave it out"
            )
        if rate:
            setattr(own, attribute, rate)
    given = {"config": own} if any(rates.values()) else {}
    if skeleton or not (pretrained or weights):
        with torch.device("meta") if skeleton else contextlib.nullcontext():
            model = kind(own)
    elif weights is None:
        model = _filled(kind, f"hf:{place}", say, place, **given)
    else:
        state = _state_dict(weights, kind(own))
        model = _filled(kind, f"weights {weights}", say, None, config=own, state_dict=state)
    seen = getattr(config, "vision_config", config)
    patch = getattr(seen, "patch_size", None)
    patch = tuple(seen.tubelet_size[1:]) if patch is None else _pair(patch)
    facts = _processing(place, getattr(seen, "num_channels", 3), _pair(seen.image_size))
    return model, {**facts, "patch": patch, "resizes": not hasattr(seen, "num_frames")}


def _filled(kind: Any, called: str, say: Say, place: str | None, **given: Any) -> nn.Module:
    """A model with weights, every one of which is in the file: of `place`, or `given`."""
    given["output_loading_info"] = True
    with _quietly():
        model, found = kind.from_pretrained(place, **given)
        lacking = _lacking(model, found)
        if any(key.startswith("pooler.dense") for key in lacking):
            model, found = kind.from_pretrained(place, add_pooling_layer=False, **given)
            lacking = _lacking(model, found)
            say(f"{called}: no pooler in the file: the features are the class row")
    fresh = [key for key in lacking if key.startswith(("fc_norm.", "pooler.layernorm."))]
    if fresh:
        say(f"{called}: a new norm behind the mean of the rows")
    if missing := [key for key in lacking if key not in fresh]:
        raise _Refused(f"{called}: the weights lack {listed(missing, _MOST)}")
    left = sorted({key.partition(".")[0] for key in found["unexpected_keys"]})
    if left:
        say(f"{called}: not taken of the file: {listed(left, _MOST)}")
    return model


def _state_dict(weights: str | Path, model: nn.Module) -> dict[str, torch.Tensor]:
    """Of the state dicts in a file, the one that shares most names with a model's.

    Raises:
        CheckpointError: it cannot be read, or holds none.
    """
    own = set(model.state_dict())
    tables = [table for _, table, _ in tables_of(read_weights_file(weights) or {}, str(weights))]
    if not tables:
        raise CheckpointError(f"weights {weights}: expected a state dict, found none")
    return max(tables, key=lambda table: len(own & table.keys()))


def _lacking(model: nn.Module, found: dict[str, Any]) -> list[str]:
    """Names of what the file lacks or has in another shape, but for the head, which is replaced."""
    keys = {*found["missing_keys"], *(str(key[0]) for key in found["mismatched_keys"])}
    head = f"{hf.head_name(model)}."
    return sorted(key for key in keys if not key.startswith(head))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' own report of what it has not found, for ours is an error, and bars."""
    theirs = _library("transformers", "hf").utils.logging
    before, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(before)
        if bars:
            theirs.enable_progress_bar()


def _processing(place: str, channels: int, size: tuple[int, int]) -> dict[str, Any]:
    """What preprocessor_config.json says of images; nothing more than their size without one."""
    facts: dict[str, Any] = {"input_size": (channels, *size)}
    base = _library("transformers.image_processing_base", "hf").ImageProcessingMixin
    try:
        with _quietly():
            said, _ = base.get_image_processor_dict(place)
    except OSError:
        return facts
    # a value v of 0..1 enters as (255 v rescale_factor - offset - mean) / std
    scale = 255 * said.get("rescale_factor", 1 / 255) if said.get("do_rescale", True) else 255
    shift = 1.0 if said.get("offset") else 0.0
    if said.get("do_normalize", True):
        if said.get("image_mean") is None or said.get("image_std") is None:
            return facts
        means, stds = said["image_mean"], said["image_std"]
    else:
        means, stds = [0.0] * channels, [1.0] * channels
    facts["mean"] = tuple((m + shift) / scale for m in means)
    facts["std"] = tuple(s / scale for s in stds)
    if isinstance(said.get("resample"), int):
        facts["interpolation"] = _RESAMPLES[said["resample"]]
    cuts = bool(said.get("do_center_crop"))
    whole, crop = said.get("size"), said.get("crop_size")
    if isinstance(whole, int):  # of an older file: both sides, or the shorter one of what is cut
        whole = {"shortest_edge": whole} if cuts else {}
    shortest = (whole or {}).get("shortest_edge")
    facts["crop_pct"], facts["crop_mode"] = 1.0, "squash" if shortest is None else "center"
    if cuts and crop and shortest:
        facts["crop_pct"] = (crop if isinstance(crop, int) else crop["height"]) / shortest
    return facts


# ---- open_clip


def _from_open_clip(
    place: str, pretrained: bool, skeleton: bool, given: str | Path | None
) -> tuple[Any, dict[str, Any]]:
    library = _library("open_clip", "clip")
    name, tag = place, None
    if not place.startswith(("hf-hub:", "local-dir:")):
        name, _, tag = place.partition("/")
        known = library.list_models()
        if name not in known:
            raise _Refused(f"open_clip:{place}: open_clip has no model {name}")
        tags = library.list_pretrained_tags_by_model(name)
        if pretrained and given is None and tag not in tags:
            raise _Refused(
                f"open_clip:{place}: expected open_clip:{name}/TAG, one of "
                f"{', '.join(tags) or 'none'}; or give --no-pretrained"
            )
    weights = pretrained and given is None and not skeleton
    device = "meta" if skeleton else "cpu"
    with torch.device(device) if skeleton else contextlib.nullcontext():
        model = library.create_model(
            name,
            pretrained=tag if weights else None,
            load_weights=weights,
            require_pretrained=weights,
            device=device,
        )
    if given is not None and not skeleton:
        found = library.load_checkpoint(model, str(given), strict=False)
        missing = [key for key in getattr(found, "missing_keys", ()) if key.startswith("visual.")]
        if missing:
            raise _Refused(f"weights {given}: they lack {listed(missing, _MOST)}")
    tower = model.visual
    said = tower.preprocess_cfg
    modes = {"shortest": "center", "longest": "border", "squash": "squash"}
    size = _pair(tower.image_size)
    facts = {
        "input_size": (3, *size),
        "mean": tuple(said["mean"]),
        "std": tuple(said["std"]),
        "interpolation": said["interpolation"],
        "crop_pct": 1.0,
        "crop_mode": modes[said["resize_mode"]],
    }
    return tower, {**facts, "patch": (1, 1), "resizes": False}


def _pair(size: int | Iterable[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


# ---- two towers


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Without open_clip's, which go to the root logger."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)


def load_two_towers(
    name: str, *, pretrained: bool = True, say: Say | None = None
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """A CLIP or SigLIP model of that name with both towers, its tokenizer, and what its images must
    look like, as `load_named` says it.

    Args:
        name: one for which `is_named`.
        pretrained: with weights; without them they are random.
        say: as in `load_named`.

    Raises:
        ValueError: no such model, one without two towers, weights that lack a part of it, or no
            tokenizer beside it.
        ImportError: its library is not installed.
    """
    source, _, place = name.partition(":")
    tell = say or (lambda line: None)
    try:
        if source == "open_clip":
            library = _library("open_clip", "clip")
            with _without_warnings():  # that it has no weights
                _, facts = _from_open_clip(place, pretrained, True, None)
            known, _, tag = place.partition("/")
            if place.startswith(("hf-hub:", "local-dir:")):
                known, tag = place, ""
            with contextlib.nullcontext() if pretrained else _without_warnings():
                model = library.create_model(
                    known,
                    pretrained=tag if pretrained and tag else None,
                    load_weights=pretrained,
                    require_pretrained=pretrained,
                )
            tokenizer = library.get_tokenizer(known)
        else:
            transformers = _library("transformers", "hf")
            config = transformers.AutoConfig.from_pretrained(place)
            kind = (config.architectures or ["no architecture"])[0]
            if kind not in ("CLIPModel", "SiglipModel"):
                raise _Refused(f"{name}: {kind} has no two towers, expected CLIPModel, SiglipModel")
            of = getattr(transformers, kind)
            model = _filled(of, name, tell, place) if pretrained else of(config)
            tokenizer = transformers.AutoTokenizer.from_pretrained(place)
            seen = config.vision_config
            facts = _processing(place, seen.num_channels, _pair(seen.image_size))
            facts["patch"] = _pair(seen.patch_size)
    except (ImportError, _Refused):
        raise
    except Exception as error:  # the libraries and the hub raise whatever their parts raise
        raise ValueError(f"{name}: {first_line(error)}") from error
    facts = {key: value for key, value in facts.items() if key not in ("patch", "resizes")}
    where = Path(place.rpartition(":")[2])
    facts |= {"architecture": type(model).__name__, "tag": where.name if where.exists() else place}
    return model.float().eval(), tokenizer, facts
