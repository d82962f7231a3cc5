"""Names of classes to the token ids that a text tower takes, with places for learned rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .backbones.clip_text import TextView


def template_of(template: str | None, context: nn.Module | None) -> str:
    """The text of a class, {} for its name; None: what is usual with this context.

    Raises:
        TypeError, ValueError: as `prompted_clip`.
    """
    if template is None:
        return "{}." if context is not None and count_of(context) else "a photo of a {}."
    if not isinstance(template, str) or template.count("{}") != 1:
        raise ValueError(
            f"template must be a text with one {{}} for the class name, got {template!r}"
        )
    return template


def tokenised(
    view: TextView,
    class_names: Sequence[str],
    template: str,
    tokenizer: Callable[..., Any] | None,
    context: nn.Module | None,
    model: nn.Module,
) -> tuple[Tensor, list[int] | None]:
    """Token ids (C, N) with place-holders for the context's rows, and the lengths of the class
    names where its position asks for them: what `PromptedText` is made of.

    Raises:
        TypeError, ValueError: as `prompted_clip`.
    """
    names = _checked_names(class_names)
    count = 0 if context is None else count_of(context)
    take = _tokenizer_of(view, tokenizer, model)
    if view.end is None:  # the tokenizer alone says whether texts begin with a token of their own
        one, other = take(["cat", "oak"])[:, 0]
        view.starts = int(one == other)
    ids = take([template.replace("{}", name) for name in names])
    rows = view.shape.num_tokens
    room = rows - count
    full = view.eot(ids) >= room if view.end is not None else (ids[:, room:] != ids[:, -1:]).any(1)
    if bool(full.any()):
        at = int(full.int().argmax())
        raise ValueError(
            f"class_names[{at}], {names[at]!r}, with template {template!r} and {count} context "
            f"rows has no room in the {rows} rows of the text tower: shorten one of them"
        )
    ids = ids[:, :rows]
    _warn_of_one_text(ids, names)
    held = ids[:1, view.starts : view.starts + 1].expand(len(ids), count)
    ids = torch.cat([ids[:, : view.starts], held, ids[:, view.starts : room]], dim=1)
    if count == 0 or getattr(context, "position", None) != "middle":
        return ids, None
    if not template.startswith("{}"):
        raise ValueError(
            "template must begin with {} where the context's position is 'middle', got "
            f"{template!r}"
        )
    if view.end is None:
        raise ValueError("context.position must be 'end' for a text tower without an end token")
    return ids, (view.eot(take(list(names))) - view.starts).tolist()


def _warn_of_one_text(ids: Tensor, names: Sequence[str]) -> None:
    """Where two classes have it: their scores are the same."""
    seen: dict[tuple[int, ...], int] = {}
    for i, row in enumerate(ids.tolist()):
        first = seen.setdefault(tuple(row), i)
        if first != i:
            warnings.warn(
                f"class_names[{first}], {names[first]!r}, and class_names[{i}], {names[i]!r}, are "
                "one text to the tokenizer: nothing tells them apart",
                stacklevel=4,  # who builds the model
            )
            return


def _checked_names(class_names: Sequence[str]) -> list[str]:
    if isinstance(class_names, str) or not isinstance(class_names, Sequence) or not class_names:
        raise ValueError(f"class_names must be a list of at least one name, got {class_names!r}")
    for i, name in enumerate(class_names):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"class_names[{i}] must be a name that is not empty, got {name!r}")
    return list(class_names)


def _tokenizer_of(
    view: TextView, tokenizer: Callable[..., Any] | None, model: nn.Module
) -> Callable[[list[str]], Tensor]:
    """Texts to ids (C, N or more), on the CPU, that are not cut."""
    rows = view.shape.num_tokens
    if tokenizer is None:
        if not type(model).__module__.startswith("open_clip") or view.shape.vocabulary != 49408:
            raise ValueError(
                "tokenizer must be given, the one that the text tower was trained with: "
                "open_clip.get_tokenizer(name), or transformers.AutoTokenizer.from_pretrained(name)"
            )
        from open_clip.tokenizer import SimpleTokenizer

        tokenizer = SimpleTokenizer(context_length=rows)
    if not callable(tokenizer):
        raise TypeError(f"tokenizer must be callable, got {type(tokenizer).__name__}")
    theirs: Any = tokenizer
    padded = {"padding": "max_length", "max_length": rows, "return_tensors": "pt"}
    # asked for one row more, open_clip's cut what does not fit, and it is seen
    longer = {"context_length": rows + 1} if hasattr(theirs, "context_length") else {}

    def take(texts: list[str]) -> Tensor:
        if hasattr(
            theirs, "pad_token_id"
        ):  # of transformers, whose long texts are left as they are
            lists = theirs(texts)["input_ids"]
            if max(map(len, lists)) > rows:
                at = max(range(len(texts)), key=lambda i: len(lists[i]))
                raise ValueError(
                    f"the text {texts[at]!r} has {len(lists[at])} tokens, and the text tower "
                    f"{rows} rows: shorten it"
                )
            found = theirs(texts, **padded)["input_ids"]
        else:
            found = theirs(texts, **longer)
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(texts):
            raise ValueError(
                f"tokenizer must give int64 ({len(texts)}, {rows}) of {len(texts)} texts, got "
                f"{tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__}"
            )
        if found.shape[1] < rows:
            raise ValueError(
                f"tokenizer must pad its texts to the {rows} rows of the text tower, got "
                f"{found.shape[1]}"
            )
        return found.long().cpu()

    return take


def count_of(context: nn.Module) -> int:
    """n of a context."""
    count = getattr(context, "num_tokens", None)
    if type(count) is not int or count < 0:
        raise TypeError(
            f"{type(context).__name__}.num_tokens must be an integer of at least 0, got {count!r}"
        )
    return count


def name_lengths_of(
    position: str, count: int, given: Sequence[int] | None, classes: int
) -> list[int]:
    """Tokens of each class name; the least that there must be where nobody needs to know."""
    if position == "end" or count == 0:
        return [1] * classes
    lengths = [] if given is None else list(given)
    if len(lengths) != classes or not all(type(n) is int and n > 0 for n in lengths):
        raise ValueError(
            f"name_lengths must be {classes} positive integers where context.position is 'middle', "
            f"got {given}"
        )
    return lengths


def places_of(
    tokens: Tensor, starts: int, count: int, lengths: list[int] | None
) -> tuple[Tensor, Tensor]:
    """Where live rows go, (C, n), and the tokens (C, N) in that order; `lengths`: of the names
    that stand in the middle of them.
    """
    live = torch.arange(starts, starts + count, device=tokens.device).repeat(len(tokens), 1)
    if lengths is None:
        return live, tokens
    middle, behind, tokens = starts + count // 2, starts + count, tokens.clone()
    for row, places, length in zip(tokens, live, lengths):
        moved = torch.cat([row[behind : behind + length], row[middle:behind]])
        row[middle : behind + length] = moved
        places[count // 2 :] += length
    return live, tokens
