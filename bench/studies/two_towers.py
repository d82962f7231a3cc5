"""What a step of two-tower prompt tuning costs: CLIP ViT-B/16 as transformers runs it, and ours.

    python -m bench.studies.two_towers [GROUP ...] [--arms ARM ...] [--rounds 3]
    python -m bench.studies.two_towers --table

The classes are the first 100 of ImageNet, by name; the loss is the cross-entropy over all of them;
gradients are those of everything that is trained.
Arms of a group take turns in one process, ours among them; a figure is the median over rounds of
the quotient of one round, the arm's time over ours. What is measured takes the place of the same
arm in bench/results/science/two_towers.json, so that a group may be measured in several calls.

    text       forward and backward of the text's features, 16 learned rows before the names
    step       images and texts: forward, loss and backward; as in DAPT, with 16 live prompts in the
               image tower
    coop       the same with the 16 rows of the texts alone
    upt        with 4 rows of each tower, which a small transformer makes
    apt-vl     with 50 approximated prompts in every block of both towers

Arms, over "fast", which is `engine="fast"`: "textbook" runs transformers' blocks (fused attention,
causal) on all 77 rows; "cut" the same on the rows up to the last end token, which anybody can do.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pae
from bench.rows import checked
from bench.studies import runs
from bench.table import table_of

JSON = "two_towers.json"
GROUPS = ("text", "step", "coop", "upt", "apt-vl")
ARMS, OURS = ("textbook", "cut"), "fast"
CLASSES, ROWS = 100, 16
TINY = {
    "vision_config": {"image_size": 32, "num_hidden_layers": 2, "hidden_size": 64},
    "text_config": {"hidden_size": 64, "num_hidden_layers": 2},
}
TINY["vision_config"] |= {"patch_size": 16, "num_attention_heads": 2, "intermediate_size": 64}
TINY["text_config"] |= {"num_attention_heads": 2, "intermediate_size": 64}
BASE = {"vision_config": {"patch_size": 16}}
SIZES = {"ViT-B/16": BASE, "tiny": TINY}


def pair_of(group: str) -> pae.prompts.Pair:
    """The prompts of both towers."""
    made = {
        "coop": lambda: pae.prompts.CoOp(ROWS),
        "upt": lambda: pae.prompts.UPT(4),
        "apt-vl": lambda: pae.prompts.ApproximatedPair(50, 4),
    }
    return made.get(group, lambda: pae.prompts.DAPT(ROWS, ROWS))()


def model_of(size: str, group: str) -> pae.PromptedCLIP:
    """Random weights, in training mode."""
    import transformers
    from open_clip.tokenizer import SimpleTokenizer
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    torch.manual_seed(0)
    clip = transformers.CLIPModel(transformers.CLIPConfig(**SIZES[size]))
    names = IMAGENET_CLASSNAMES[:CLASSES]
    made = {"pair": pair_of(group), "tokenizer": SimpleTokenizer()}
    return pae.prompted_clip(clip, class_names=names, **made).train()


def works(model: pae.PromptedCLIP, group: str, batch: int) -> dict[str, Callable[[], list[Tensor]]]:
    """By arm what is timed; it returns the gradients."""
    text, wanted = model.text, [p for p in model.parameters() if p.requires_grad and p.numel()]
    pixels = model.vision.view.default_size
    images, labels = torch.randn(batch, 3, *pixels), torch.arange(batch) % CLASSES
    length = max(text._layout.lengths)

    def features(arm: str) -> Tensor:
        if arm != "cut":
            return model.text_features("fast" if arm == "fast" else "reference")
        if hasattr(text.context, "start_forward"):
            text.context.start_forward()
        rows = text.embed()[:, :length]
        return F.normalize(text.view.read_rows(rows, text.ends, text._bypasses()), dim=1)

    def of_text(arm: str) -> Callable[[], list[Tensor]]:
        def work() -> list[Tensor]:
            found = features(arm)
            weights = torch.linspace(-1, 1, found.numel()).view_as(found)
            return list(torch.autograd.grad((found * weights).sum(), [text.context.tokens]))

        return work

    def of_step(arm: str) -> Callable[[], list[Tensor]]:
        def work() -> list[Tensor]:
            torch.manual_seed(0)  # of dropout
            seen = model.features(images, engine="fast" if arm == "fast" else "reference")
            loss = F.cross_entropy(model.logits(seen, features(arm)), labels)
            return list(torch.autograd.grad(loss, wanted))

        return work

    made = of_text if group == "text" else of_step
    return {arm: made(arm) for arm in (*ARMS, OURS)}


def measure(model: pae.PromptedCLIP, group: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Quotients of every round and seconds of ours, by arm; gradients are compared before."""
    arms = works(model, group, arguments.batch)
    arms = {arm: arms[arm] for arm in (*(arguments.arms or ARMS), OURS)}
    peer, *others = arms.values()
    expected = {f"d_{i}": gradient for i, gradient in enumerate(peer())}
    for other in others:
        checked(other(), expected, {torch.float32: 1e-3})
    seconds = runs.in_turns(arms, arguments.rounds, arguments.clock, torch.device("cpu"))
    ours = seconds.pop(OURS)
    return {
        arm: {
            "ratios": runs.quotients(mine, ours),
            "our_seconds": runs.short(statistics.median(ours)),
            "batch": arguments.batch,
        }
        for arm, mine in seconds.items()
    }


def counts(text: pae.PromptedText) -> dict[str, Any]:
    """Of the text tower: rows that run through its blocks, and GFLOP of the products of a forward
    with weights, by what runs them.

    A row costs 12 D^2 in a block. Ours in the last block: one query, its key matrix and its value
    matrix for the sum, projection and MLP of one row per class, 12 D^2; and in every block before,
    2 D^2 for keys and values of a row that all classes share.
    """
    layout, (groups, _) = text._layout, text._groups()
    shared, depth = layout.shared - layout.constant, text.view.shape.depth
    apart = sum(len(text.tokens[at]) * (end - layout.shared) for at, end in groups)
    rows = {
        "textbook": text.tokens.numel(),
        "cut": len(text.tokens) * max(layout.lengths),
        OURS: shared + apart,
    }
    squares = {arm: 12 * depth * count for arm, count in rows.items()}
    squares[OURS] = (12 * rows[OURS] + 2 * shared) * (depth - 1) + 12 * len(text.tokens)
    width = text.view.shape.width
    return {"rows": rows, "gflop": {a: round(2e-9 * n * width**2, 1) for a, n in squares.items()}}


def table(numbers: dict[str, Any]) -> str:
    """One row per group and arm that was measured."""
    lines = []
    for group in GROUPS:
        for arm in ARMS:
            if record := numbers.get(group, {}).get(arm):
                over, rounds = runs.spread(record["ratios"]).values()
                lines.append(
                    {
                        "work": group,
                        "images": "-" if group == "text" else str(record["batch"]),
                        "by": arm,
                        "over ours": over,
                        "rounds": rounds,
                        "ours, s": f"{record['our_seconds']:.2f}",
                    }
                )
    return table_of(lines)


def main() -> None:
    own = {
        "--size": {"default": "ViT-B/16", "choices": SIZES},
        "--batch": {"type": int, "default": 8, "help": "images of a step"},
        "--rounds": {"type": int, "default": 3},
    }
    arguments = runs.steps_command("two_towers", dict.fromkeys(GROUPS, ARMS), own)
    path = arguments.to / JSON
    numbers = runs.read_json(path)
    if not arguments.table:
        keep = ("size", "clock")
        numbers["setting"] = {name: getattr(arguments, name) for name in keep}
        numbers["setting"] |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
        for group in arguments.groups or GROUPS:
            model = model_of(arguments.size, group)
            if group == "text":
                numbers |= counts(model.text)
            numbers.setdefault(group, {}).update(measure(model, group, arguments))
            runs.write_json(path, numbers)
    print({name: numbers.get(name) for name in ("setting", "rows", "gflop")})
    print(table(numbers))


if __name__ == "__main__":
    main()
