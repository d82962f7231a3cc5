"""What a family's parts say of each other, so that nothing a family answers is ever ignored.

`complete` runs when a class is made: it derives what follows from the overridden methods and
refuses contradictions. `check_answers` runs when a family joins a model: it asks once and compares
the answers with what the family says of itself. Every refusal is one line that names the class, the
part, and what to do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pae_kernels.checks import describe

if TYPE_CHECKING:
    from .base import PromptFamily

# attribute -> the method that it says is asked
DERIVED = {
    "adjusts_rows": "adjust_rows",
    "reads_class_attention": "adjust_attended_rows",
    "rewrites_rows": "next_rows",
    "bypasses_attention": "attention_bypass",
}
STATED = ("enters_sequence", "enters_before_norm", "depends_on_input", "moves_prompts")
QUESTIONS = (
    "bind", "config", "prompt_counts", "block_prompts", "all_prompts", "group_index",
    "head_keys_values", *DERIVED.values(), "observed", "observe", "observe_features",
    "start_forward", "raw_prompts", "set_prompts", "penalty", "start_of_epoch", "remap",
    "see_labels", "end_of_step", "end_of_epoch",
)  # fmt: skip
BETWEEN_STEPS = ("start_of_epoch", "remap", "end_of_step", "end_of_epoch")
# question -> what keeps it from being asked, and what to do instead
UNASKED = {
    "all_prompts": {
        "depends_on_input": "override block_prompts alone",
        "enters_sequence": "override block_prompts alone",
        "head_keys_values": "override block_prompts alone",
    },
    "head_keys_values": {"enters_sequence": "give the rows of every block, or live rows alone"},
    "group_index": {"enters_sequence": "give rows (B, P, D) instead"},
}
SAME = 1e-3  # relative distance of the same products in another order


def complete(cls: type[PromptFamily], base: type[PromptFamily]) -> None:
    """Derive the attributes of a new class, and refuse it if its parts contradict each other.

    Raises:
        TypeError: in one line.
    """
    _check_names(cls, base)
    _check_signatures(cls, base)
    for flag in (*DERIVED, *STATED):
        value = inspect.getattr_static(cls, flag)
        if not isinstance(value, (bool, property)):
            raise TypeError(f"{cls.__name__}.{flag} must be True or False, got {value!r}")
    for flag, method in DERIVED.items():
        overridden = _overrides(cls, base, method)
        stated = vars(cls).get(flag)
        if stated is True and not overridden:
            raise TypeError(
                f"{cls.__name__}.{flag} is True and {method} is not overridden: override it, or "
                "leave the attribute out, which follows from the method"
            )
        if stated is False and overridden:
            raise TypeError(
                f"{cls.__name__}.{flag} is False and {method} is overridden, so it would not be "
                "asked: leave the attribute out, or let the constructor set it for some instances"
            )
        if isinstance(inspect.getattr_static(cls, flag), bool):
            setattr(cls, flag, overridden)
    if _overrides(cls, base, "all_prompts") and _above(cls, "block_prompts", "all_prompts"):
        cls.all_prompts = base.all_prompts  # type: ignore[method-assign]
    _check_observed(cls, base)
    _check_together(cls, cls, base)


def check_answers(family: PromptFamily, base: type[PromptFamily]) -> None:
    """Ask a family that has just been bound what both forwards will ask, and compare.

    Raises:
        TypeError, ValueError: in one line.
    """
    cls, depth = type(family), family.shape.depth
    for flag, method in DERIVED.items():
        if getattr(family, flag) and not _overrides(cls, base, method):
            raise TypeError(
                f"{cls.__name__}.{flag} is True and {method} is not overridden: override it, or "
                "leave the attribute alone, which follows from the method"
            )
    _check_together(family, cls, base)
    if wrong := [i for i in family.observed if i not in range(depth)]:
        raise ValueError(
            f"{cls.__name__}.observed must hold indices of the {depth} blocks, got {wrong[0]}"
        )
    counts = list(family.prompt_counts)
    if len(counts) != depth:
        raise ValueError(
            f"{cls.__name__}.prompt_counts must hold one count per block, {depth}, got "
            f"{len(counts)}"
        )
    if family.enters_sequence and any(counts[1:]):
        raise ValueError(
            f"{cls.__name__}.prompt_counts must be 0 behind block 0 where enters_sequence is True, "
            f"got {counts}"
        )
    if not family.depends_on_input:
        _compare_answers(family, base, counts)


def check_rows(family: PromptFamily, index: int, rows: Tensor, group: Tensor | None) -> None:
    """Refuse rows of a block that do not fit what the family says of them.

    Raises:
        ValueError: another number of rows than `prompt_counts` says, or one set of rows for the
            whole batch together with a group index.
    """
    name = f"{type(family).__name__}.block_prompts({index})"
    if (count := family.prompt_counts[index]) != rows.shape[-2]:
        raise ValueError(
            f"{name} gives rows {tuple(rows.shape)}, and prompt_counts says {count}: they must be "
            "one number"
        )
    if group is not None and rows.dim() != 3:
        raise ValueError(
            f"{name} must give rows (G, P, D) where group_index picks one of G sets, got "
            f"{tuple(rows.shape)}"
        )


def check_sets(
    family: PromptFamily,
    index: int,
    rows: Tensor | None,
    group: Tensor | None,
    head_kv: Tensor | None,
    batch: int,
) -> None:
    """Refuse sets of prompts that are not one for each image: a kernel finds an image's set by its
    number, and reads whatever lies there.

    Raises:
        ValueError: rows (B', P, D) or keys and values (B', P, 2, H, d) of another number of images
            than the batch's, or a group index that is not one integer for each image.
    """
    name = type(family).__name__
    if group is not None and (
        tuple(group.shape) != (batch,) or group.dtype not in (torch.int64, torch.int32)
    ):
        raise ValueError(
            f"{name}.group_index must give int64 ({batch},), one per image, got {describe(group)}"
        )
    for question, given, shared in (("block_prompts", rows, 2), ("head_keys_values", head_kv, 4)):
        if given is None or given.dim() == shared or (group is not None and given is rows):
            continue
        if len(given) not in (1, batch):
            raise ValueError(
                f"{name}.{question}({index}) gives {len(given)} sets {tuple(given.shape)} for "
                f"{batch} images: give one for each, one for all, or a group_index"
            )


def _overrides(cls: type, base: type, name: str) -> bool:
    return inspect.getattr_static(cls, name) is not inspect.getattr_static(base, name)


def _place(cls: type, name: str) -> int:
    """How far up the class that answers is: 0 for `cls` itself."""
    return next(i for i, c in enumerate(cls.__mro__) if name in vars(c))


def _above(cls: type, upper: str, lower: str) -> bool:
    """Whether `upper` was overridden in a class nearer to `cls` than `lower` was."""
    return _place(cls, upper) < _place(cls, lower)


def _check_together(owner: Any, cls: type[PromptFamily], base: type[PromptFamily]) -> None:
    """Parts that exclude or need each other; `owner` is the class, or an instance of it."""
    name = cls.__name__

    def says(part: str) -> bool:
        if part in QUESTIONS:
            return _overrides(cls, base, part)
        return getattr(owner, part) is True  # a property of the class says nothing yet

    for question, reasons in UNASKED.items():
        for reason, instead in reasons.items():
            # what a class inherits it may leave unasked, but not what it brings itself
            own = question != "all_prompts" or not _above(cls, reason, question)
            if says(question) and says(reason) and own:
                stated = "is overridden" if reason in QUESTIONS else "is True"
                raise TypeError(
                    f"{name}.{question} would never be asked, because {reason} {stated}: {instead}"
                )
    if says("rewrites_rows") and owner.enters_sequence is False:
        raise TypeError(
            f"{name}.next_rows would never be asked, because enters_sequence is False and no rows "
            "live on: set enters_sequence = True in the class"
        )
    if says("enters_before_norm") and owner.enters_sequence is False:
        raise TypeError(
            f"{name}.enters_before_norm is True and enters_sequence is False: rows that do not "
            "join the sequence pass no norm in front of it; leave it out"
        )
    if says("moves_prompts") and not any(says(hook) for hook in BETWEEN_STEPS):
        raise TypeError(
            f"{name}.moves_prompts is True and nothing moves them: override one of "
            f"{', '.join(BETWEEN_STEPS)}"
        )


def _check_observed(cls: type[PromptFamily], base: type[PromptFamily]) -> None:
    shown, said = _overrides(cls, base, "observe"), inspect.getattr_static(cls, "observed")
    named = isinstance(said, property) and _overrides(cls, base, "observed")
    if not isinstance(said, property):
        if not isinstance(said, frozenset):
            raise TypeError(
                f"{cls.__name__}.observed must be a frozenset of block indices, or a property that "
                f"returns one, got {said!r}"
            )
        named = bool(said)
    if shown and not named:
        raise TypeError(
            f"{cls.__name__}.observe would never be asked, because observed names no block: set it "
            "to a frozenset of block indices, or override it as a property"
        )
    if named and not shown:
        raise TypeError(
            f"{cls.__name__}.observed names blocks and observe is not overridden: override it, or "
            "leave observed out"
        )


def _check_signatures(cls: type[PromptFamily], base: type[PromptFamily]) -> None:
    for name in QUESTIONS:
        asked = vars(base)[name]
        own = vars(cls).get(name)
        if name in ("bind", "config") or not (
            inspect.isfunction(own) and inspect.isfunction(asked)
        ):
            continue
        given = list(inspect.signature(asked).parameters)
        try:
            inspect.signature(own).bind(*given)
        except TypeError:
            hint = ""
            if name == "adjust_rows":
                hint = "; adjust_attended_rows is the question that brings the class attention"
            raise TypeError(
                f"{cls.__name__}.{name} must take ({', '.join(given)}), got "
                f"({', '.join(inspect.signature(own).parameters)}){hint}"
            ) from None


def _check_names(cls: type[PromptFamily], base: type[PromptFamily]) -> None:
    for name, value in vars(cls).items():
        if name.startswith("_") or hasattr(base, name):
            continue
        asks = callable(value) or isinstance(value, property)
        for known in QUESTIONS if asks else (*DERIVED, *STATED, "observed"):
            if known not in vars(cls) and _alike(name, known):
                raise TypeError(
                    f"{cls.__name__}.{name} resembles {known}, and nothing asks for it under this "
                    f"name: call it {known}, or give it a name of its own"
                )


def _alike(name: str, known: str) -> bool:
    """Whether `name` is `known` with one slip per word, or with its words in another order."""
    words, wanted = name.lower().split("_"), known.split("_")
    if sorted(_stems(words)) == sorted(_stems(wanted)):
        return True
    return len(words) == len(wanted) and all(
        a == b or (len(b) > 4 and _one_slip(a, b)) for a, b in zip(words, wanted)
    )


def _stems(words: list[str]) -> Iterator[str]:
    return (word.rstrip("s") for word in words if word not in ("of", "on", "at", "the"))


def _one_slip(a: str, b: str) -> bool:
    """Whether one letter is missing, too many, another one, or swapped with its neighbour."""
    if len(a) > len(b):
        a, b = b, a
    at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), len(a))
    if len(a) < len(b):
        return len(b) - len(a) == 1 and a[at:] == b[at + 1 :]
    return a[at + 1 :] == b[at + 1 :] or (
        a[at : at + 2] == b[at : at + 2][::-1] and a[at + 2 :] == b[at + 2 :]
    )


def _compare_answers(family: PromptFamily, base: type[PromptFamily], counts: list[int]) -> None:
    """Answers that depend on parameters alone: the same whatever the rows are, and as announced."""
    like = next(family.parameters(), torch.empty(0))
    if like.device.type == "meta":
        return
    name, shape = type(family).__name__, family.shape
    generator = torch.Generator("cpu").manual_seed(0)
    size = 2, shape.num_tokens, shape.width
    shown = torch.randn(size, generator=generator, device="cpu").to(like.device, like.dtype)
    unknown = shown.new_full((), torch.nan).expand_as(shown)
    modes = {module: module.training for module in family.modules()}
    family.eval()
    try:
        with torch.no_grad(), _own_draws(like.device) as again:
            first, second = (_answers(family, x, again) for x in (shown, unknown))
            for question, answer in first.items():
                if not _equal(answer, second[question]):
                    raise TypeError(
                        f"{name}.{question} reads the values of x, and depends_on_input is False: "
                        "set depends_on_input = True"
                    )
            for i, count in enumerate(counts):
                given = first[f"block_prompts({i})"]
                if given is not None:
                    check_rows(family, i, given, first["group_index"])
                elif count:
                    raise ValueError(
                        f"{name}.block_prompts({i}) gives no rows, and prompt_counts says {count}: "
                        "they must be one number"
                    )
            if _overrides(type(family), base, "all_prompts") and not family.enters_sequence:
                again()
                _check_all_prompts(family, family.all_prompts(shown), first)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _answers(
    family: PromptFamily, x: Tensor, again: Callable[[], None]
) -> dict[str, Tensor | None]:
    again()
    found = {"group_index": family.group_index(x)}
    for i in range(family.shape.depth):
        found[f"block_prompts({i})"] = family.block_prompts(i, x)
        found[f"head_keys_values({i})"] = family.head_keys_values(i, x)
    return found


def _check_all_prompts(
    family: PromptFamily, given: list[Tensor | None], one_by_one: dict[str, Tensor | None]
) -> None:
    name = type(family).__name__
    if len(given) != family.shape.depth:
        raise TypeError(
            f"{name}.all_prompts must give one entry per block, {family.shape.depth}, got "
            f"{len(given)}"
        )
    for i, rows in enumerate(given):
        alone = one_by_one[f"block_prompts({i})"]
        same = rows is alone
        if rows is not None and alone is not None and rows.shape == alone.shape:
            distance = SAME + 8 * torch.finfo(rows.dtype).eps
            same = bool((rows - alone).norm() <= distance * alone.norm())
        if not same:
            raise TypeError(
                f"{name}.all_prompts and block_prompts give block {i} different rows: override "
                "both or neither"
            )


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


@contextmanager
def _own_draws(device: torch.device) -> Iterator[Callable[[], None]]:
    """The random numbers of the outside world stay as they are; the value restarts those inside."""

    def restart() -> None:
        torch.default_generator.manual_seed(0)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(0)

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield restart
