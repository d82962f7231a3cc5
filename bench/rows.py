"""What the rows of all benchmark files share: values checked before any time is taken, compiled
rows, and rows in one version of an op.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor

from pae_kernels import backends

from .runner import Provider, Runnable, Settings, Unavailable, relative

T = TypeVar("T")


def errors(got: Iterable[Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Norm-relative error of every result; 0 for an empty one, e.g. the gradient of no prompts."""
    pairs = zip(expected.items(), got, strict=True)
    return {name: relative(a.to(b.device), b) if b.numel() else 0.0 for (name, b), a in pairs}


def checked(
    got: Iterable[Tensor], expected: Mapping[str, Tensor], limits: Mapping[Any, float]
) -> dict[str, float]:
    """Columns "value_error" and, of results named d_..., "gradient_error": the largest ones.

    Args:
        limits: the error allowed, by name of a result or else by its dtype.

    Raises:
        AssertionError: a result is further off than that.
    """
    got = list(got)
    columns: dict[str, float] = {}
    for (name, error), result in zip(errors(got, expected).items(), got):
        limit = limits[name] if name in limits else limits[result.dtype]
        assert error <= limit, f"{name} is off by {error:.1e}, more than {limit:.1e}"
        column = "gradient_error" if name.startswith("d_") else "value_error"
        columns[column] = max(error, columns.get(column, 0.0))
    return columns


def row(
    work: Callable[[], Iterable[Tensor]],
    expected: Mapping[str, Tensor],
    limits: Mapping[Any, float],
    columns: Mapping[str, float],
    **options: Any,
) -> Runnable:
    """A row whose work returns the very results that are checked; `columns` hold for every such
    row of its group, `options` are those of `Runnable`.
    """
    return Runnable(work, lambda: {**columns, **checked(work(), expected, limits)}, **options)


def attempt(what: str, work: Callable[[], T]) -> T:
    """`work()`. Whatever stops it is no fault of ours: the row is left out with it as its reason.

    Raises:
        Unavailable: it stopped.
    """
    try:
        return work()
    except Exception as error:
        raise Unavailable.because(what, error) from error


def compiled(
    function: Callable[..., T], trial: Callable[[Callable[..., T]], object], **options: Any
) -> Callable[..., T]:
    """torch.compile(function, **options), compiled by `trial`, which calls it."""
    torch._dynamo.reset()
    made = torch.compile(function, **options)
    attempt("torch.compile", lambda: trial(made))
    return made


def in_version(version: str, op: str, like: Tensor, work: Callable[[], T]) -> Callable[[], T]:
    """`work` with this version of the ops.

    Raises:
        Unavailable: that version of `op` does not run on the device or in the dtype of `like`.
    """
    with mock.patch.dict(os.environ, {"PAE_BACKEND": version}):
        try:
            backends.choose(op, like.device, like.dtype)
        except RuntimeError as error:
            raise Unavailable(str(error)) from error

    def forced() -> T:  # a patch of all the environment would take longer than a small op
        before, os.environ["PAE_BACKEND"] = os.environ.get("PAE_BACKEND", ""), version
        try:
            return work()
        finally:
            os.environ["PAE_BACKEND"] = before

    return forced


def start_in(
    version: str,
    op: str,
    like: Callable[[Any], Tensor],
    start: Callable[[Any], Runnable],
    shared: Any,
) -> Runnable:
    """What `start` makes ready, in this version of an op. `like(shared)`: a tensor of the device
    and dtype it runs in.
    """
    ready, given = start(shared), like(shared)
    work, check = (in_version(version, op, given, each) for each in (ready.work, ready.check))
    return replace(ready, work=work, check=check)


def ours_in_versions(
    op: str, settings: Settings, like: Callable[[Any], Tensor], start: Callable[[Any], Runnable]
) -> list[Provider]:
    """Our rows of one op: on a GPU what runs there by itself, on a CPU every version, the one that
    runs by itself first; `like` and `start` as `start_in` takes them.
    """
    if settings.on_gpu:
        return [Provider("pae", start)]
    versions = {"pae, CPU": "cpu", "pae, reference": "reference"}
    made = {name: partial(start_in, version, op, like, start) for name, version in versions.items()}
    return [Provider(*each) for each in made.items()]
