"""Files of a `PromptedCLIP`: what was trained, and which towers and classes it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .backbones.facts import are_facts, difference, facts_of
from .backbones.trained import names
from .checkpoint import (
    check_part,
    describe_part,
    fill,
    finite,
    identity,
    read_described,
    versions,
    write_described,
)
from .errors import CheckpointError, one_line
from .task import TaskInfo

if TYPE_CHECKING:
    from .clip import PromptedCLIP

FORMAT = "pae-clip-1"


def _towers(model: PromptedCLIP) -> dict[str, dict[str, str]]:
    trained = names(model.vision.trained_backbone)
    return {
        "image": identity(model.vision.backbone, trained),
        "text": identity(model.text.backbone),
    }


def _facts(model: PromptedCLIP) -> dict[str, dict[str, Any]]:
    trained = names(model.vision.trained_backbone)
    return {"image": facts_of(model.vision.view, trained), "text": facts_of(model.text.view)}


def save(
    model: PromptedCLIP, path: str | Path, extra: Mapping[str, str] | None, task: TaskInfo | None
) -> None:
    """See `PromptedCLIP.save`."""
    task = model.task if task is None else task
    if task is not None and not isinstance(task, TaskInfo):
        raise ValueError(f"task must be a pae.TaskInfo or None, got {type(task).__name__}")
    vision = model.vision
    description: dict[str, Any] = {
        "format": FORMAT,
        "towers": _towers(model),
        "facts": _facts(model),
        "classes": None if model.class_names is None else list(model.class_names),
        "num_classes": model.num_classes,
        "template": model.template,
        "prompts": describe_part(vision.prompts),
        "context": describe_part(model.text.context),
        "pair": describe_part(model.pair),
        "kld": describe_part(vision.kld),
        "pool": vision.pool,
        "train_backbone": list(vision.trained_backbone),
        "task": None if task is None else task.record(),
        "versions": versions(),
    }
    state = finite(path, model.trained_state())
    write_described(path, state, extra, description)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], TaskInfo | None]:
    """What was trained, by name; what it is, as `save` wrote it; and the task.

    Raises:
        CheckpointError: no file of this format, or a damaged one.
    """
    hints = {"pae-2": ": it is of one tower, which PromptedViT.load reads"}
    state, said, _ = read_described(path, (FORMAT,), hints)
    try:
        return state, said, TaskInfo.read(said["task"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {one_line(error)}") from error


def load(model: PromptedCLIP, path: str | Path, other_classes: bool) -> None:
    """See `PromptedCLIP.load`."""
    path = Path(path)
    state, said, task = read(path)
    try:
        _check(model, path, said, other_classes)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {one_line(error)}") from error
    fill(model, path, state)
    model.task = task


def _check(model: PromptedCLIP, path: Path, said: Mapping[str, Any], other_classes: bool) -> None:
    """Raise unless the file belongs to these towers, parts and classes."""
    for side, own in _towers(model).items():
        found = said["towers"][side]
        if found != own:
            what = "positions" if found["fingerprint"] == own["fingerprint"] else "fingerprint"
            raise CheckpointError(
                f"checkpoint {path} was trained on the {side} tower {found['backbone']} with "
                f"{what} {found[what]}, got {own['backbone']} with {own[what]}"
            )
    for side, facts in _facts(model).items():
        theirs = said.get("facts", {}).get(side, {})
        if not are_facts(theirs):
            raise ValueError(f"its facts of the {side} tower are {theirs!r}")
        if other := difference(theirs, facts):
            raise CheckpointError(
                f"checkpoint {path} was trained on the {side} tower of these weights with {other}: "
                "build it as it was"
            )
    for name, own_value in (
        ("pool", model.vision.pool),
        ("train_backbone", list(model.vision.trained_backbone)),
    ):
        if said[name] != own_value:
            raise CheckpointError(
                f"checkpoint {path} was trained with {name} {said[name]!r}, and the model has "
                f"{own_value!r}"
            )
    for role, part in (
        ("prompts", model.vision.prompts),
        ("context", model.text.context),
        ("pair", model.pair),
    ):
        check_part(path, role, said[role], part)
    template = said.get("template")
    if None not in (template, model.template) and template != model.template:
        raise CheckpointError(
            f"checkpoint {path} was trained with texts {template!r}, and the model has "
            f"{model.template!r}: give prompted_clip the same template"
        )
    names = None if said["classes"] is None else tuple(said["classes"])
    if not other_classes and (names, said["num_classes"]) != (model.class_names, model.num_classes):
        raise CheckpointError(
            f"checkpoint {path} was trained on {said['num_classes']} classes, {_first(names)}, and "
            f"the model has {model.num_classes}, {_first(model.class_names)}: give "
            "other_classes=True to use it on these"
        )


def _first(names: tuple[str, ...] | None) -> str:
    if names is None:
        return "without names"
    return ", ".join(map(repr, names[:2])) + (", ..." if len(names) > 2 else "")
