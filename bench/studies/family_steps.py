"""What a training step of every prompt family costs, and of every option that changes its work.

    python -m bench.studies.family_steps [GROUP ...] [--arms ARM ...] [--rounds 7]
    python -m bench.studies.family_steps --table

All arms of a group take turns in one process, its base among them; a figure is the median over
rounds of the quotient of one round. A step is forward, penalty and backward (the optimiser's part
is the same code for all), through the fast engine unless an arm says another; what the loop does
once per epoch is done before. What is measured takes the place of the same arm in
bench/results/science/family_steps.json, so that a group may be measured in several calls.

The weights are random, the backbone is shared by all arms. Groups:

    deep       families whose prompts are only read, and what is trained besides; over VPT-deep
    live       families whose prompts stay in the sequence; over VPT-shallow
    pool       VPT-deep on a backbone that pools its rows; over the rows of the image alone
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import pae
from bench import shapes
from bench.studies import runs
from bench.table import table_of
from pae.choices import POOLS
from pae.train import methods
from pae.train.options import Options

JSON = "family_steps.json"
LEAST = 3  # rounds, however long they take


@dataclass(frozen=True)
class Arm:
    """A method of `pae train` with these options of its own and these arguments of the model."""

    method: str = "vpt-deep"
    options: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)


PER_IMAGE = {"dropout": 0.1, "method_args": {"dropout_scope": "sample"}}
OWN = {
    "pro-vpt": {"method_args": {"sweep": "reuse"}},  # the gates are a part of its step
    "bpt-shallow": {"method_args": {"rank": 50}},  # more has no use for 50 prompts
}


def _groups() -> dict[str, dict[str, Arm]]:
    """Arms by name, the first of a group its base. Every registered family is in one of them."""
    families = {m: Arm(m, OWN.get(m, {})) for m in sorted(pae.prompts.METHODS)}
    live = {m for m in families if pae.prompts.METHODS[m].enters_sequence}
    return {
        "deep": {
            "vpt-deep": families["vpt-deep"],
            **{m: arm for m, arm in families.items() if m not in live},
            "vpt-deep, dropout per image": Arm(options=PER_IMAGE),
            "vfpt, dropout per image": Arm("vfpt", PER_IMAGE),
            "vpt-deep, biases": Arm(model={"train_backbone": "biases"}),
            "da-vpt, da-vpt+": Arm("da-vpt", model={"train_backbone": "da-vpt+"}),
            "da-vpt, da-vpt+, drop-path, engine reference": Arm(
                "da-vpt",
                {"engine": "reference", "drop_path": 0.1},
                {"train_backbone": "da-vpt+"},
            ),
        },
        "live": {m: families[m] for m in ("vpt-shallow", *sorted(live - {"vpt-shallow"}))},
        "pool": {f'pool="{pool}"': Arm(model={"pool": pool}) for pool in POOLS},
    }


GROUPS = _groups()


def step(
    arm: Arm, backbone: nn.Module, num_tokens: int, batch: int
) -> tuple[pae.PromptedViT, Callable[[], None]]:
    """The arm's model and a training step of it, after what a loop does before its first epoch."""
    device = next(backbone.parameters()).device
    chosen = Options(method=arm.method, num_tokens=num_tokens, **arm.options).resolved()
    torch.manual_seed(0)
    family = methods.build_prompts(chosen, shapes.CLASSES)
    model = pae.PromptedViT(backbone, family, num_classes=shapes.CLASSES, **arm.model)
    methods.start_training(model, chosen)
    generator = torch.Generator().manual_seed(1)
    images, labels = shapes.random_batch(backbone, shapes.CLASSES, batch, device, generator)
    with torch.no_grad():  # as in the middle of training, not as families start
        for parameter in family.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    family.remap(model, [(images, labels)])
    family.start_of_epoch(lambda: ())

    def work() -> None:
        family.see_labels(labels)
        loss = F.cross_entropy(model(images, engine=chosen.engine), labels) + model.penalty()
        loss.backward()
        family.end_of_step()
        model.zero_grad(set_to_none=True)

    return model, work


def measure(group: str, names: list[str] | None, arguments: argparse.Namespace) -> dict[str, Any]:
    """Quotients of every round and seconds of the base, by arm."""
    arms = GROUPS[group]
    base = next(iter(arms))
    chosen = {name: arms[name] for name in (base, *(names or arms)) if name in arms}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    changes = {"global_pool": "avg"} if group == "pool" else {}
    steps, plans = {}, None
    shared = shapes.random_backbone(arguments.model, device, **changes)
    for name, arm in chosen.items():
        backbone, own = shared, "train_backbone" in arm.model  # which changes it
        if own:
            more = {"drop_path_rate": arm.options.get("drop_path", 0.0)}
            backbone = shapes.random_backbone(arguments.model, device, **changes, **more)
        model, steps[name] = step(arm, backbone, arguments.num_tokens, arguments.batch)
        if not own:  # folded once for all
            model._plans = plans
        steps[name]()  # folds, and warms up
        if not own:
            plans = model._plans
    limits = arguments.seconds, LEAST
    seconds = runs.in_turns(steps, arguments.rounds, arguments.clock, device, *limits)
    return {
        name: {
            "ratios": runs.quotients(mine, seconds[base]),
            "base_seconds": runs.short(statistics.median(seconds[base])),
        }
        for name, mine in seconds.items()
        if name != base
    }


def run(arguments: argparse.Namespace) -> None:
    path = arguments.to / JSON
    keep = ("model", "num_tokens", "batch", "clock")
    setting = {name: getattr(arguments, name) for name in keep}
    setting |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    for group in arguments.groups or GROUPS:
        found = measure(group, arguments.arms, arguments)
        numbers = runs.read_json(path)  # others may have written
        for name, record in found.items():
            record["setting"] = setting
            numbers.setdefault(group, {})[name] = record
            print(f"{group} {name}: {runs.spread(record['ratios'])}", flush=True)
        runs.write_json(path, numbers)


def ratio(record: dict[str, Any]) -> float:
    """The figure of an arm."""
    return statistics.median(record["ratios"])


def table(numbers: dict[str, Any]) -> str:
    """One row an arm, in the order of `GROUPS`; what was not measured has none."""
    lines = []
    for group, arms in GROUPS.items():
        base = next(iter(arms))
        for name in arms:
            if record := numbers.get(group, {}).get(name):
                lines.append({"step of": name, "over": base, **runs.spread(record["ratios"])})
    return table_of(lines)


def blocks(numbers: dict[str, Any]) -> dict[str, str]:
    """What docs/families.md shows."""
    setting = next(iter(numbers["deep"].values()))["setting"]
    return {
        "family steps setting": (
            f"{setting['model']}, {setting['num_tokens']} prompts, batch {setting['batch']}, fp32, "
            f"{setting['clock']} time, {setting['threads']} thread"
        ),
        "family steps table": table(numbers),
    }


def main() -> None:
    own = {
        "--model": {"default": shapes.BASE},
        "--num-tokens": {"type": int, "default": 50},
        "--batch": {"type": int, "default": 2},
        "--rounds": {"type": int, "default": 7},
        "--seconds": {
            **{"type": float, "default": math.inf},
            "help": "no round begins later, after the third",
        },
    }
    arguments = runs.steps_command("family_steps", GROUPS, own)
    if arguments.table:
        print(table(runs.read_json(arguments.to / JSON)))
    else:
        run(arguments)


if __name__ == "__main__":
    main()
