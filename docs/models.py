"""Writes the table of docs/backbones.md: what `pae models` says of timm's models, by file."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

import timm

sys.path.insert(0, str(Path(__file__).parents[1]))

from pae.train.models import Row, asked

PAGE = Path(__file__).with_name("backbones.md")
_BLOCK = re.compile(r"(<!-- models -->\n).*(<!-- end of models -->)", re.DOTALL)
# files of timm with plain transformers, or nearly
FILES = ["beit", "cait", "convit", "deit", "eva", "hiera", "naflexvit", "pit", "swin_transformer"]
FILES += ["swin_transformer_v2", "swin_transformer_v2_cr", "tnt", "vision_transformer"]
FILES += ["vision_transformer_hybrid", "vision_transformer_relpos", "vision_transformer_sam"]
FILES += ["vitamin", "volo", "xcit"]


def names() -> dict[str, list[str]]:
    """The architectures of each of `FILES`."""
    return {file: timm.list_models(module=file) for file in FILES}


def table(rows: dict[str, list[Row]]) -> str:
    """Of the rows of each file."""
    tags = Counter(name.partition(".")[0] for name in timm.list_models(pretrained=True))
    lines = [
        "| timm file | architectures | both engines | reference alone | pretrained tags |"
        " taken | why not, most often |",
        "|---|---|---|---|---|---|---|",
    ]
    for file, own in sorted(rows.items()):
        engines = Counter(row.engine for row in own)
        weights = sum(tags[row.name] for row in own)
        taken = sum(tags[row.name] for row in own if row.engine != "none")
        why = Counter(row.why for row in own if row.engine == "none").most_common(1)
        reason = f"{why[0][0]}" if why else ""
        lines.append(
            f"| {file} | {len(own)} | {engines['fast']} | {engines['reference']} | {weights} | "
            f"{taken} | {reason} |"
        )
    return "\n".join(lines)


def page(block: str) -> str:
    """The page with `block` as its table."""
    before = PAGE.read_text(encoding="utf-8")
    return _BLOCK.sub(lambda m: f"{m[1]}\n{block}\n\n{m[2]}", before)


if __name__ == "__main__":
    rows = {file: [asked(name) for name in found] for file, found in names().items()}
    PAGE.write_text(page(table(rows)), encoding="utf-8")
