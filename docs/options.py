"""Writes the tables of docs/training.md from the declarations in pae/train/options.py."""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from pae.train.declared import table
from pae.train.options import Options

PAGE = Path(__file__).with_name("training.md")
_BLOCK = re.compile(r"(<!-- options -->\n).*(<!-- end of options -->)", re.DOTALL)


def page() -> str:
    """The page as it should be."""
    before = PAGE.read_text(encoding="utf-8")
    return _BLOCK.sub(lambda m: f"{m[1]}\n{table(Options)}\n{m[2]}", before)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
