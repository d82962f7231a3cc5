"""Which families there are: by the method's name, as the command line knows them, and by class."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from .base import PromptFamily

METHODS: dict[str, type[PromptFamily]] = {}
"""Method name, as in `pae train --method`, to the class of its family."""

_NOT_FAMILIES = ("compare", "full", "linear")  # words of --method for something else
_Family = TypeVar("_Family", bound=type[PromptFamily])


def register(method: str) -> Callable[[_Family], _Family]:
    """A class decorator: make a prompt family known by `method`, and by its class name.

    From then on `pae train --method` takes it and `pae.PromptedViT.from_file` builds it. A family
    that lives outside of this package is known once its module has been imported.

        @pae.prompts.register("bank")
        class BankVPT(pae.prompts.PromptFamily): ...

    Args:
        method: lower-case letters, digits and hyphens.

    Raises:
        TypeError: what is decorated is no subclass of `PromptFamily`.
        ValueError: another form of name, or a method or class name that another family has. A class
            that is defined again (the cell of a notebook, run twice) takes its own place.
    """
    if not isinstance(method, str) or not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", method):
        raise ValueError(
            f"method must be lower-case letters, digits and hyphens like 'vpt-deep', got {method!r}"
        )
    if method in _NOT_FAMILIES:
        raise ValueError(f"method must not be one of {_NOT_FAMILIES}, which are no families")

    def add(family: _Family) -> _Family:
        if not (isinstance(family, type) and issubclass(family, PromptFamily)):
            raise TypeError(f"method {method!r} must be a subclass of PromptFamily, got {family!r}")
        others = {m: other for m, other in METHODS.items() if _path(other) != _path(family)}
        for name, other in others.items():
            if name == method:
                raise ValueError(
                    f"method {method!r} of {_path(family)} is taken by {_path(other)}; choose "
                    "another name"
                )
            if other.__name__ == family.__name__:
                raise ValueError(
                    f"class {_path(family)} has the name of {_path(other)}, and checkpoints build "
                    "families by it; choose another name"
                )
        for name in METHODS.keys() - others.keys():
            del METHODS[name]
        METHODS[method] = family
        return family

    return add


PAIRS: dict[str, type] = {}
"""Method name, as in `pae train --task clip --method`, to the class of its pair of prompts."""

_Pair = TypeVar("_Pair", bound=type)


def register_pair(method: str) -> Callable[[_Pair], _Pair]:
    """A class decorator: make a `Pair` of prompts known by `method`, as `register` does a family.

    Args:
        method: lower-case letters, digits and hyphens, not the name of a family.

    Raises:
        ValueError: another form of name, or one that is taken.
    """
    if not isinstance(method, str) or not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", method):
        raise ValueError(
            f"method must be lower-case letters, digits and hyphens like 'upt-deep', got {method!r}"
        )

    def add(pair: _Pair) -> _Pair:
        taken = METHODS.get(method) or PAIRS.get(method)
        if method in _NOT_FAMILIES or (taken is not None and _path(taken) != _path(pair)):
            raise ValueError(f"method {method!r} of {_path(pair)} is taken; choose another name")
        PAIRS[method] = pair
        return pair

    return add


def build(name: str, config: Mapping[str, Any]) -> PromptFamily:
    """Build a family from its class name and `config()`, as stored in checkpoints.

    Raises:
        ValueError: no registered family has this name.
    """
    families = {family.__name__: family for family in METHODS.values()}
    if name not in families:
        raise ValueError(
            f"name must be one of {sorted(families)}, got {name!r}: a family of one's own is known "
            "once the module that registers it (pae.prompts.register) has been imported"
        )
    return families[name](**config)


def _path(family: type) -> str:
    return f"{family.__module__}.{family.__qualname__}"
