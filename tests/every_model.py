"""The fast engine against the reference on every architecture of timm that `pae models` accepts.

    python -m tests.every_model RECORD               all of them; those in the file RECORD are done
    python -m tests.every_model RECORD "*dinov3*"    those whose names match
    python -m tests.every_model RECORD --seconds 300   stop then; call it again to go on
    python -m tests.every_model RECORD --verdict     only say what the record holds

Each is built two blocks deep, with 16 features per head and three patches a side, where its
constructor lets these be chosen, with random weights of trained size in fp64 and VPT-deep, and its
logits and the gradients of all prompts, of the head and of the images are compared: in order are
1e-9 and 1e-7, relative. A model is a second or two, all of them half an hour; a sample is in
`tests/pae/test_timm_kinds.py`. A line of RECORD is one architecture: its name, what `pae models`
says, and the two errors or what went wrong.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import pae
from docs.models import names
from pae.prompts import VPTDeep
from pae.train.models import asked
from tests.tiny import error, filled, gradients

LOGITS, GRADIENTS = 1e-9, 1e-7
HEAD_WIDTH, SIDE, DEPTH = 16, 3, 2


def build(name: str, depth: int = DEPTH) -> nn.Module:
    """The architecture, as small as its constructor makes it, with random weights, in fp64."""
    errors = []
    for options in _options(name, depth):
        try:
            model = timm.create_model(name, **options)
        except Exception as error:  # whatever a constructor says to an option that it lacks
            errors.append(f"{type(error).__name__}: {error}")
            continue
        model.blocks = model.blocks[:depth]
        return filled(model).double().eval()
    raise ValueError(errors[-1])


def _options(name: str, depth: int) -> Iterator[dict[str, Any]]:
    """Small first, as it is last."""
    size: dict[str, Any] = {}
    with torch.device("meta"):
        try:
            first = timm.create_model(name, depth=1)
            heads = first.blocks[0].attn.num_heads
            size = {"embed_dim": heads * HEAD_WIDTH, "img_size": SIDE * _patch(first)}
        except Exception:
            size = {}
    for embed, image, deep in product((True, False), (True, False), (True, False)):
        wanted = {"embed_dim": embed, "img_size": image}
        options = {key: size[key] for key, given in wanted.items() if given and key in size}
        yield {**options, **({"depth": depth} if deep else {})}


def _patch(model: Any) -> int:
    """Pixels of a side of what becomes one row."""
    if hasattr(model, "embeds"):
        return model.embeds.patch_size[0]
    stem = model.patch_embed
    return stem.img_size[0] // stem.grid_size[0]


def compared(name: str) -> dict[str, Any]:
    """What becomes of one architecture."""
    row = asked(name)
    found: dict[str, Any] = {"name": name, "engine": row.engine, "why": row.why}
    if row.engine != "fast":
        return found
    backbone = build(name)
    model = pae.PromptedViT(backbone, VPTDeep(2), num_classes=3).train()
    with torch.no_grad():
        for p in model.prompts.parameters():
            p.copy_(0.7 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    size = model.view.default_size
    if model.view.image_size is None:
        size = tuple(SIDE * p for p in model.view.shape.patch_size)
    generator = torch.Generator().manual_seed(0)
    shape = (2, model.view.shape.in_chans, *size)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    expected, slow = gradients(model, x, "reference", wrt_images=True)
    got, fast = gradients(model, x, "fast", wrt_images=True)
    assert all((g is None) == (fast[n] is None) for n, g in slow.items())
    errors = [error(fast[n], g) for n, g in slow.items() if g is not None]
    return {
        **found,
        "width": model.view.shape.width,
        "depth": model.view.shape.depth,
        "rows": model.view.num_rows(size),
        "logits": error(got, expected),
        "gradients": max(errors),
    }


def right(found: dict[str, Any]) -> bool:
    """Whether it is as it must be."""
    if found["engine"] != "fast":
        return True
    return "failed" not in found and found["logits"] < LOGITS and found["gradients"] < GRADIENTS


def verdict(record: list[dict[str, Any]]) -> str:
    """Of a record, in a few lines."""
    fast = [found for found in record if "logits" in found]
    counts = Counter(found["engine"] for found in record)
    tags = Counter(name.partition(".")[0] for name in timm.list_models(pretrained=True))
    lines = [
        f"{len(record)} architectures: {counts['fast']} in both engines, "
        f"{counts['reference']} in the reference alone, {counts['none']} not",
        f"{sum(map(right, fast))} of {counts['fast']} equal, with "
        f"{sum(tags[found['name']] for found in fast if right(found))} pretrained tags",
    ]
    for key in ("logits", "gradients"):
        if fast:
            worst = max(fast, key=lambda found: found[key])
            lines.append(f"largest error of {key}: {worst[key]:.1e} ({worst['name']})")
    lines += [f"WRONG {json.dumps(found)}" for found in record if not right(found)]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.every_model", description=__doc__)
    parser.add_argument("record", type=Path, help="file that holds a line per architecture")
    parser.add_argument("pattern", nargs="?", default="*", help="of names, with * and ?")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin none after that")
    parser.add_argument("--verdict", action="store_true", help="compare nothing more")
    given = parser.parse_args(arguments)
    started = time.monotonic()
    record: list[dict[str, Any]] = []
    if given.record.exists():
        record = [json.loads(line) for line in given.record.read_text().splitlines()]
    done = {found["name"] for found in record}
    asked_for = [n for own in names().values() for n in own if fnmatchcase(n, given.pattern)]
    left = [] if given.verdict else [n for n in asked_for if n not in done]
    with given.record.open("a") as file:
        for name in left:
            if time.monotonic() - started > given.seconds:
                break
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    found = compared(name)
                except Exception as error:  # a finding, whatever it is
                    what = " ".join(f"{type(error).__name__}: {error}".split())
                    found = {"name": name, "engine": "fast", "failed": what}
            record.append(found)
            file.write(json.dumps(found) + "\n")
            file.flush()
            print(json.dumps(found), flush=True)
            gc.collect()
    print(verdict(record))
    missing = len({*asked_for} - {found["name"] for found in record})
    print(f"{missing} left" if missing else "none left")
    return int(not all(map(right, record)))


if __name__ == "__main__":
    raise SystemExit(main())
