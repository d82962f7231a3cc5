"""What is learned: one class per task, and the loop asks it wherever tasks differ."""

from __future__ import annotations

from importlib import import_module

from pae.choices import TASKS
from pae.train.options import Options
from pae.train.tasks.kind import Kind, Shown

__all__ = ["TASKS", "Kind", "Shown", "kind_of"]


def kind_of(options: Options) -> Kind:
    """The task that resolved options name: class `Own` of the module of that name.

    Raises:
        ValueError: it is not built.
    """
    try:
        module = import_module(f"pae.train.tasks.{options.task}")
    except ModuleNotFoundError as error:
        if error.name != f"pae.train.tasks.{options.task}":
            raise
        raise ValueError(f"--task {options.task}: this version does not have it yet") from None
    return module.Own(options)
