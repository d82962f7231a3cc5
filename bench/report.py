"""Everything that README.md and docs/ show of the measurements, made from the committed JSON.

    python -m bench.report            rewrite all generated blocks and all figures
    python -m bench.report --check    exit 1 and name what is not as the JSON says

A generated block is whatever lies between two comments with its name:

    <!-- generated: suite step -->
    ...
    <!-- end: suite step -->

or, for a number in a sentence, the same within one line (not at its beginning: Markdown would take
the line for HTML). Figures are docs/figures/NAME.svg and .png.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pae.checkpoint import write_atomically

from . import figures, pages
from .studies import (
    continual,
    convergence,
    end_to_end,
    families,
    family_steps,
    first_command,
    int8,
    mpa_bf16,
    small_vtab,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
RESULTS, FIGURES = Path("bench/results"), Path("docs/figures")

BLOCK = re.compile(
    r"(?P<begin><!-- generated: (?P<name>[^>]+?) -->)(?P<text>.*?)(?P<end><!-- end: (?P=name) -->)",
    re.DOTALL,
)
_MARKER = re.compile(r"<!-- (?:generated|end): [^>]+? -->")


# modules with `blocks(numbers)`, text by name, and those that draw with `figures(numbers)`, drawing
# functions by name; and where below bench/results the numbers are: one file's JSON, or by file name
# that of a pattern
Sources = tuple[tuple[Any, str], ...]
SOURCES: Sources = (
    (pages, "*.json"),
    (families, "science/families.json"),
    (family_steps, "science/family_steps.json"),
    (continual, "science/continual.json"),
    (convergence, "science/convergence.json"),
    (end_to_end, "science/end_to_end.json"),
    (int8, "science/int8.json"),
    (mpa_bf16, "science/mpa_bf16.json"),
    (first_command, "science/first_command.json"),
    (small_vtab, "science/small_vtab.json"),
)


class Report:
    """The report of the tree below `root`.

    Attributes:
        blocks: text by name.
        figures: name -> the function that draws it, and the description that its files carry.
    """

    def __init__(self, root: Path = ROOT, sources: Sources = SOURCES) -> None:
        self.root = Path(root)
        self.blocks: dict[str, str] = {}
        self.figures: dict[str, tuple[Callable[[], Figure], str]] = {}
        for module, files in sources:
            paths = sorted((self.root / RESULTS).glob(files))
            texts = {path.name: path.read_text() for path in paths}
            read = {name: json.loads(text) for name, text in texts.items()}
            numbers = read if "*" in files else read[Path(files).name]
            digest = hashlib.blake2b(repr(sorted(texts.items())).encode(), digest_size=8)
            description = f"drawn from numbers {digest.hexdigest()}"
            self.blocks |= module.blocks(numbers)
            drawn = module.figures(numbers) if hasattr(module, "figures") else {}
            self.figures |= {name: (draw, description) for name, draw in drawn.items()}

    def pages(self) -> Iterator[Path]:
        yield self.root / "README.md"
        yield from sorted((self.root / "docs").rglob("*.md"))

    def _rewritten(self, page: str) -> str:
        def put(found: re.Match) -> str:
            if (text := self.blocks.get(found["name"])) is None:
                return found[0]
            if found["text"].startswith("\n"):
                text = f"\n\n{text.strip()}\n\n"
            return found["begin"] + text + found["end"]

        return BLOCK.sub(put, page)

    def write(self) -> list[Path]:
        """Rewrite blocks and figures; the files that changed."""
        changed = []
        for path in self.pages():
            before = path.read_text()
            after = self._rewritten(before)
            if after != before:
                write_atomically(path, lambda p, text=after: p.write_text(text))
                changed.append(path)
        for name, (draw, description) in self.figures.items():
            before = [path.read_bytes() if path.exists() else b"" for path in self._files(name)]
            with figures.style():
                drawn = draw()
            written = figures.save(drawn, self.root / FIGURES / name, description)
            changed += [path for path, old in zip(written, before) if path.read_bytes() != old]
        return changed

    def problems(self) -> list[str]:
        """One line for everything in the tree that `write` would change or cannot make."""
        found = []
        for path in self.pages():
            page, name = path.read_text(), path.relative_to(self.root)
            for block in BLOCK.finditer(page):
                if block["name"] not in self.blocks:
                    found.append(f"{name}: no source knows block '{block['name']}'")
                elif self._rewritten(block[0]) != block[0]:
                    found.append(f"{name}: block '{block['name']}' is not what the numbers say")
            alone = _MARKER.findall(BLOCK.sub("", page))
            found += [f"{name}: {marker} has no partner" for marker in alone]
        for figure, (_, description) in self.figures.items():
            files = [path.relative_to(self.root) for path in self._files(figure)]
            missing = [path for path in files if not (self.root / path).exists()]
            found += [f"{path}: missing" for path in missing]
            if not missing and description not in (self.root / files[0]).read_text():
                found.append(f"{files[0]}: drawn from other numbers")
        return found

    def _files(self, name: str) -> list[Path]:
        """Of one figure, the one whose text can be read first."""
        return [self.root / FIGURES / f"{name}.{suffix}" for suffix in figures.FORMATS]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    report = Report()
    if not parser.parse_args(arguments).check:
        for path in report.write():
            print(path.relative_to(report.root))
    problems = report.problems()
    for problem in problems:
        print(problem, file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
