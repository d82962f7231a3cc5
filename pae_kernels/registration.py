"""Ops from declarations: `op` for one direction, `differentiable` for a forward and its backward.

A declaration is a functional schema per direction (fresh outputs, nothing mutated), what the
outputs look like, and which function of a version's module computes them. What PyTorch wants to
know follows from it: definition, both device keys, fakes, and autograd twice. `register_autograd`
serves `torch.compile` and `torch.export`; eager calls go through an `autograd.Function` over the
same two ops and the same backward, which costs less per call. Second derivatives, forward-mode
ones and `torch.func` are those of the op's definition in plain PyTorch.

The schemas name all that passes from a forward to its backward, so nothing else connects them:

    d_y      argument of the backward: the gradient of the output y. Outputs without one are not
             differentiable, and come last.
    x, y     argument of the backward: an input or an output of the forward, saved for it.
    need_x   argument of the backward: whether x needs a gradient; d_x is empty if not.
    d_x      return of the backward: the gradient of the input x.

Implementations run with autocast off, which would reach into them: products stay in the dtype that
came in. For the same reason they run in `exact_products`: those of fp32 are never TF32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from . import backends, precision
from .checks import transform
from .precision import exact_matmul, exact_products

_LIBRARY = torch.library.Library("pae", "FRAGMENT")


def contiguous_rows(t: Tensor) -> Tensor:
    """A layout: the last axis is contiguous, the others have whatever strides they have."""
    return t if t.stride(-1) == 1 else t.contiguous()


def widest(*arguments: Any) -> torch.dtype:
    """The dtype that holds the values of all tensors."""
    dtype = arguments[0].dtype
    for a in arguments:
        if isinstance(a, Tensor) and a.dtype != dtype:
            dtype = torch.promote_types(dtype, a.dtype)
    return dtype


def rarest(*arguments: Any) -> torch.dtype:
    """Of the dtypes among tensors and arguments, the one that the fewest versions compute."""
    dtypes = {a.dtype if isinstance(a, Tensor) else a for a in arguments}
    first: torch.dtype = arguments[0].dtype
    return next((d for d in (torch.float64, torch.float16) if d in dtypes), first)


def op(
    schema: str,
    run: str | Callable[..., Any],
    fake: Callable[..., Any],
    *,
    versions: str,
    layout: Callable[[Tensor], Tensor] | None = Tensor.contiguous,
    dtype: Callable[..., torch.dtype] | None = None,
    products: bool = True,
    no_gradient: str | None = None,
) -> Any:
    """Register one op without a backward.

    Args:
        schema: "name(Tensor x, ...) -> (Tensor y, ...)". The first argument is a tensor: the op
            runs on its device.
        run: name of a version's function that takes the schema's arguments; or a function of the
            version's module and these arguments.
        fake: of the schema's arguments: empty outputs of the right shape, dtype and layout.
        versions: what `backends.register` calls the versions.
        layout: what versions may rely on, applied to every tensor among the arguments; None leaves
            their strides to the versions.
        dtype: of the arguments: what the version has to be capable of; that of the first argument
            when None.
        products: whether the op makes any, which must be of fp32 where their factors are.
        no_gradient: why there is none, for the error of asking for one.

    Returns:
        `torch.ops.pae.<name>`, its only overload.
    """
    made = _defined(schema)
    _implement(made, run, fake, versions, layout, dtype, products)
    if no_gradient is not None:

        def refuse(ctx: Any, *_: Any) -> None:
            raise RuntimeError(f"a gradient was asked for, but {no_gradient}")

        torch.library.register_autograd(made.name(), refuse, lib=_LIBRARY)
    return made


def differentiable(
    name: str,
    forward: str,
    backward: str,
    run: tuple[str | Callable[..., Any], str | Callable[..., Any]],
    fake: Callable[..., Any],
    *,
    definition: Callable[..., Any] | None = None,
    fake_gradients: Callable[..., Any] | None = None,
    returned: int | None = None,
    layout: Callable[[Tensor], Tensor] | None = Tensor.contiguous,
    dtype: Callable[..., torch.dtype] | None = None,
) -> Callable[..., Any]:
    """Register `<name>_fwd` and `<name>_bwd`.

    Args:
        name: of the op and of its versions.
        forward, backward: schemas without their names, as the head of this module says.
        run: as in `op`, for both directions.
        fake: as in `op`, for the forward.
        definition: of the forward's arguments, which the backward must get: what the caller sees,
            in operations that PyTorch differentiates as often as wanted. Without one, further
            derivatives are refused.
        fake_gradients: as in `op`, for the backward. When None, gradients look like their inputs,
            which the backward then must get.
        returned: how many outputs the caller sees, the first ones; all when None.
        layout, dtype: as in `op`.

    Returns:
        The differentiable function of the forward's arguments.

    Raises:
        ValueError: an argument or a return of the backward is none of what the head lists, or the
            shape of a gradient does not follow.
    """
    forward, backward = f"{name}_fwd{forward}", f"{name}_bwd{backward}"
    schema, schema_back = torch._C.parse_schema(forward), torch._C.parse_schema(backward)
    inputs, outputs = [a.name for a in schema.arguments], [r.name for r in schema.returns]
    bwd_arguments, gradients = (
        [a.name for a in schema_back.arguments],
        [r.name for r in schema_back.returns],
    )
    tensors = {a.name for a in schema.arguments if _is_tensor(a)}
    count = sum(f"d_{y}" in bwd_arguments for y in outputs)  # differentiable outputs
    saved = [a for a in bwd_arguments if a in tensors or a in outputs]
    constants = [a for a in inputs if a not in tensors]
    optional = [i for i, x in enumerate(inputs) if f"need_{x}" in bwd_arguments]
    known = [f"d_{y}" for y in outputs[:count]] + saved + constants + [f"need_{x}" for x in inputs]
    if unknown := {*bwd_arguments} - {*known} | {*gradients} - {f"d_{x}" for x in inputs}:
        raise ValueError(f"{name}: nothing in the forward explains {sorted(unknown)}")
    if fake_gradients is None and (missing := {d[2:] for d in gradients} - {*bwd_arguments}):
        raise ValueError(f"{name}: fake_gradients is needed, the backward lacks {sorted(missing)}")

    if definition is not None and (lost := tensors - {*saved}):
        raise ValueError(f"{name}: the definition needs {sorted(lost)}, which the backward lacks")

    take_saved = _take(saved, [*inputs, *outputs])
    take_inputs = _take(inputs, [*saved, *constants]) if definition is not None else None
    take_constants = _take(constants, inputs)
    take_bwd_arguments = _take(bwd_arguments, known)
    with_gradient = [f"d_{x}" if f"d_{x}" in gradients else "" for x in inputs]
    take_gradients = _take(with_gradient, ["", *gradients])

    forward_op, backward_op = _defined(forward), _defined(backward)

    def visible(output: Any) -> Any:
        if returned is None:
            return output
        return output[0] if returned == 1 else output[:returned]

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        made = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(*made[count:])
        ctx.save_for_backward(*take_saved((*inputs, *made)))
        ctx.constants = take_constants(inputs)

    def grads(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        given = take_bwd_arguments((*d_outputs[:count], *ctx.saved_tensors, *ctx.constants, *needs))
        with torch.no_grad():
            found = backward_op(*given)
        results = take_gradients((None, *found) if isinstance(found, tuple) else (None, found))
        for i in optional:
            if not needs[i]:
                results = (*results[:i], None, *results[i + 1 :])
        if torch.is_grad_enabled():  # create_graph=True
            if definition is None or take_inputs is None:
                raise RuntimeError(f"pae::{name} has no second derivatives (create_graph=True)")
            inputs = take_inputs((*ctx.saved_tensors, *ctx.constants))
            return _differentiable_further(results, definition, inputs, needs, d_outputs)
        return results

    def like_inputs(*given: Any) -> Any:
        values = dict(zip(bwd_arguments, given))
        made = []
        for d in gradients:
            x = values[d.removeprefix("d_")]
            made.append(x.new_empty(x.shape if values.get(f"need{d[1:]}", True) else 0))
        return tuple(made) if len(made) > 1 else made[0]

    def eager(ctx: Any, *inputs: Any) -> Any:
        output = forward_op(*inputs)
        save(ctx, inputs, output)
        return visible(output)

    methods = {"forward": staticmethod(eager), "backward": staticmethod(grads)}
    camel = name.title().replace("_", "")  # what `grad_fn` and profilers show
    apply = type(camel, (torch.autograd.Function,), methods).apply  # type: ignore[attr-defined]

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return visible(forward_op(*inputs))
        if around := transform():
            if definition is None:
                raise RuntimeError(f"pae::{name} cannot be followed by {around}")
            with torch.autocast(inputs[0].device.type, enabled=False):
                return definition(*inputs)
        return apply(*inputs)

    _implement(forward_op, run[0], fake, name, layout, dtype)
    _implement(backward_op, run[1], fake_gradients or like_inputs, name, layout, dtype)
    torch.library.register_autograd(forward_op.name(), grads, setup_context=save, lib=_LIBRARY)
    return call


def _differentiable_further(
    results: Sequence[Tensor | None],
    definition: Callable[..., Any],
    inputs: Sequence[Any],
    needs: Sequence[bool],
    d_outputs: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """The gradients `results`, with the derivatives of the definition's gradients."""
    # views: an input that is given twice has two gradients
    own = [t.view_as(t) if isinstance(t, Tensor) else t for t in inputs]
    with torch.autocast(inputs[0].device.type, enabled=False):
        made = definition(*own)
        made = made if isinstance(made, tuple) else (made,)
        pairs = [(y, d) for y, d in zip(made, d_outputs) if y.requires_grad]
        wanted = [i for i, need in enumerate(needs) if need]
        if not pairs or not wanted:
            return tuple(results)
        found = torch.autograd.grad(
            [y for y, _ in pairs],
            [own[i] for i in wanted],
            [d for _, d in pairs],
            create_graph=True,
            allow_unused=True,
        )
    further = list(results)
    for i, same in zip(wanted, found):
        value = results[i]
        if value is not None and same is not None:
            further[i] = same + (value - same).detach()
    return tuple(further)


def _defined(schema: str) -> Any:
    """The op of this schema, without an implementation."""
    _LIBRARY.define(schema)
    return getattr(torch.ops.pae, schema[: schema.index("(")]).default


def _implement(
    op: Any,
    run: str | Callable[..., Any],
    fake: Callable[..., Any],
    versions: str,
    layout: Any,
    dtype: Callable[..., torch.dtype] | None,
    products: bool = True,
) -> None:
    tensors = [i for i, a in enumerate(op._schema.arguments) if layout and _is_tensor(a)]

    def implementation(*given: Any) -> Any:
        kind = given[0].device.type
        wanted = given[0].dtype if dtype is None else dtype(*given)
        version = backends.choose(versions, kind, wanted)
        function = getattr(version, run) if isinstance(run, str) else partial(run, version)
        prepared = list(given)
        for i in tensors:
            if prepared[i] is not None:
                prepared[i] = layout(prepared[i])
        with exact_products if products else nullcontext():
            if not torch.is_autocast_enabled(kind):
                return function(*prepared)
            with torch.autocast(kind, enabled=False):
                return function(*prepared)

    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(op.name().removeprefix("pae::"), implementation, key)
    torch.library.register_fake(op.name(), fake, lib=_LIBRARY)


_LIBRARY.define("exact_matmul(Tensor a, Tensor b) -> Tensor")
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("exact_matmul", exact_matmul, _key)
torch.library.register_fake("pae::exact_matmul", torch.matmul, lib=_LIBRARY)
torch.library.register_autograd(
    "pae::exact_matmul", precision.gradients, setup_context=precision.save_factors, lib=_LIBRARY
)


def _is_tensor(argument: Any) -> bool:
    return "Tensor" in str(argument.type)


def _take(names: Sequence[str], among: Sequence[str]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """What takes the entries `names`, in this order, out of a tuple laid out as `among`."""
    indices = [among.index(name) for name in names]
    if len(indices) > 1:  # fewer, and it would not return a tuple
        return itemgetter(*indices)
    return lambda entries: tuple(entries[i] for i in indices)
