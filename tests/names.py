"""Which of timm's transformers are accepted, without their weights.

    python -m tests.names [PART OF N] [PATTERN]     e.g. `python -m tests.names 1 4 'vit_*'`

Every model is built on the meta device, in two blocks where it can be, and read: "fast" when its
blocks are formulas, else why not. Two lines at the end count names and pretrained tags.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections import Counter

import timm
import torch

from pae.backbones import read_backbone
from pae.errors import UnsupportedBackbone

MODULES = (
    "beit cait convit deit eva hiera naflexvit pit sam swin_transformer tnt vision_transformer "
    "vision_transformer_hybrid vision_transformer_relpos vitamin volo xcit"
)


def judged(name: str) -> str:
    """ "fast", "as it is: ..." or "refused: ..." of one name."""
    model, options = None, {"depth": 2}
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for extra in (options, {}):
            with contextlib.suppress(Exception):
                model = timm.create_model(name, **extra)
                break
        if model is None:
            return "cannot be built on the meta device"
        try:
            view = read_backbone(model)
        except UnsupportedBackbone as error:
            return f"refused: {error}"
    return "fast" if view.unproved is None else f"as it is: {view.unproved}"


def main(arguments: list[str]) -> None:
    """Prints one line a name."""
    part, of = (map(int, arguments[:2])) if len(arguments) > 1 else (1, 1)
    pattern = arguments[-1] if len(arguments) % 2 else "*"
    names = sorted({n for m in MODULES.split() for n in timm.list_models(pattern, module=m)})
    of_name = Counter(tag.partition(".")[0] for tag in timm.list_pretrained())
    found: dict[str, list[int]] = {}
    for name in names[part - 1 :: of]:
        said = judged(name)
        tags = of_name[name]
        counts = found.setdefault(said.partition(":")[0], [0, 0])
        counts[0] += 1
        counts[1] += tags
        print(f"{name} ({tags}): {said}", flush=True)
    for word, (count, tags) in sorted(found.items()):
        print(f"{word}: {count} names, {tags} tags")


if __name__ == "__main__":
    main(sys.argv[1:])
