"""From a file of `PromptedCLIP.save` to a model of two towers that takes images, and its texts.

The file says which model it was trained on, what the prompts are made of, and the text of a class;
learned rows that all classes share serve any names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import pae
from pae import clip_file
from pae.backbones import named
from pae.errors import CheckpointError, one_line
from pae.prompts import PAIRS, ApproximatedContext, TextContext
from pae.prompts import build as build_family
from pae.train.tasks.clip import readable

CONTEXTS = {kind.__name__: kind for kind in (TextContext, ApproximatedContext)}


def load(
    path: Path, recipe: Mapping[str, Any], classes: Sequence[str] | None = None
) -> pae.PromptedCLIP:
    """The model of a file, on the towers that the recipe names.

    Args:
        path: of `PromptedCLIP.save`.
        recipe: "model", and "pretrained" and "seed" where weights are random.
        classes: names other than those that the file was trained on.

    Raises:
        CheckpointError: an unreadable or damaged file, other towers, parts that are not known here.
        ValueError: no such model; no names, or rows of each class's own and other names.
    """
    _, said, _ = clip_file.read(path)
    if not named.is_named(recipe["model"]):
        raise ValueError(
            f"{path} is of two towers, and {recipe['model']} is not: give the model's name "
            "(--model open_clip:NAME/TAG, hf:NAME or hf:FOLDER)"
        )
    try:
        names = said["classes"] if classes is None else list(classes)
        own, parts = _parts(path, said)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {one_line(error)}") from error
    if names is None:
        raise ValueError(f"{path} does not say its classes: give --classes FILE, a name a line")
    if own and len(names) != own:
        raise ValueError(
            f"--classes: {len(names)} names, and {path} has learned rows of each class's own, for "
            f"{own}: other classes have none"
        )
    with torch.random.fork_rng():
        torch.manual_seed(recipe.get("seed", 0))  # random weights are drawn as they were
        clip, tokenizer, facts = named.load_two_towers(
            recipe["model"], pretrained=recipe.get("pretrained", True)
        )
        model = pae.prompted_clip(
            clip, class_names=names, template=said.get("template"), tokenizer=tokenizer, **parts
        )
    model.backbone.pretrained_cfg = facts
    return model.load(path, other_classes=classes is not None)


def _parts(path: Path, said: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """For how many classes there are rows of their own, 0 where they share them, and what
    `pae.prompted_clip` is given of the file.
    """
    parts: dict[str, Any] = {"train_backbone": tuple(said["train_backbone"])}
    if said["kld"] is not None:
        parts["kld"] = pae.KLD(**said["kld"]["config"])
    kinds = {kind.__name__: kind for kind in PAIRS.values()}
    pair, context = said["pair"], said["context"]
    for part, known in ((pair, kinds), (None if pair else context, CONTEXTS)):
        if part is not None and (part["name"] not in known or part["config"] is None):
            raise CheckpointError(
                f"checkpoint {path} has prompts of {part['name']}, which nothing here registers: "
                "build pae.prompted_clip with them, and load the file into it"
            )
    if pair is not None:
        parts["pair"] = kinds[pair["name"]](**pair["config"])
        return pair["config"].get("num_classes", 0), parts
    parts["image_prompts"] = build_family(said["prompts"]["name"], said["prompts"]["config"])
    if context is not None:
        parts["text_prompts"] = CONTEXTS[context["name"]](**context["config"])
    return (context or {"config": {}})["config"].get("num_classes", 0), parts


def describe(path: Path) -> dict[str, Any]:
    """What a file holds, as plain values, by the names of `using.describe`.

    Raises:
        CheckpointError: as `load`.
    """
    _, said, task = clip_file.read(path)
    prompts = said["pair"] or said["prompts"]
    image, text = said["towers"]["image"], said["towers"]["text"]
    return {
        "prompts": prompts["name"],
        "arguments": prompts["config"],
        "context": None if said["pair"] else said["context"],
        "template": said.get("template"),
        "kld": said["kld"],
        "backbone": image["backbone"],
        "fingerprint": image["fingerprint"],
        "text tower": text["fingerprint"],
        "train_backbone": said["train_backbone"],
        "logits": said["num_classes"],
        "versions": said["versions"],
        "task": task,
    }


def names_of(
    folders: Sequence[str], classes: Sequence[str], where: str, *, given: bool, listed: bool
) -> list[str | None]:
    """Which of the model's classes each of a folder's is: by its name, or that as words; None: it
    is none that was asked for, and its images are left out.

    Args:
        given: that somebody chose the classes, which may be some of the folder's.
        listed: that they are names in the order of the folders, where none has its own.

    Raises:
        ValueError: one is none of them.
    """
    found = [name if name in classes else readable(name) for name in folders]
    lost = [folder for folder, name in zip(folders, found) if name not in classes]
    if listed and len(lost) == len(folders) == len(classes):
        return list(classes)
    if not lost or (given and len(lost) < len(folders)):
        return [name if name in classes else None for name in found]
    raise ValueError(
        f"{where}: class {lost[0]!r} is none of the model's {len(classes)}, {classes[0]!r}, ...: "
        "give --classes, a file or names with commas: some or all of the folder's, or as many "
        "others in their order"
    )
