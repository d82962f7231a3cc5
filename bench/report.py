"""Everything that README.md and docs/ show of the measurements, made from the committed JSON.

    python -m bench.report            rewrite all generated blocks and all figures
    python -m bench.report --check    exit 1 and name what is not as the JSON says

A generated block is whatever lies between two comments with its name:

    <!-- generated: suite step -->
    ...
    <!-- end: suite step -->

or, for a number in a sentence, the same within one line (not at its beginning: Markdown would take
the line for HTML). Figures are docs/figures/NAME.svg and .png.

A source of blocks is a module with `blocks(numbers)`, text by name, and `figures(numbers)`, a
function per name that draws it; `numbers` is its JSON. Names begin with the source's own. Without
its JSON a source has no figures, and all its blocks say that nothing is measured yet.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pae.checkpoint import write_atomically

from . import figures as style

ROOT = Path(__file__).parents[1]
RESULTS, FIGURES = Path("bench/results"), Path("docs/figures")
UNMEASURED = "*Not measured yet.*"

BLOCK = re.compile(
    r"(?P<begin><!-- generated: (?P<name>[^>]+?) -->)(?P<text>.*?)(?P<end><!-- end: (?P=name) -->)",
    re.DOTALL,
)
_MARKER = re.compile(r"<!-- (?:generated|end): [^>]+? -->")


@dataclass(frozen=True)
class Source:
    """Where blocks and figures come from.

    Attributes:
        name: how the names of its blocks and figures begin.
        module: has `blocks` and `figures`.
        files: one path below bench/results, whose JSON is `numbers`; or a pattern of paths, and
            then `numbers` maps file names to their JSON.
    """

    name: str
    module: str
    files: str

    def owns(self, name: str) -> bool:
        return re.match(rf"{self.name}\b", re.sub(r"[-_]", " ", name)) is not None


SOURCES = (
    Source("suite", "bench.suite", "*.json"),
    Source("families", "bench.studies.families", "science/families.json"),
    Source("convergence", "bench.studies.convergence", "science/convergence.json"),
    Source("end to end", "bench.studies.end_to_end", "science/end_to_end.json"),
)


class Report:
    """The report of the tree below `root`."""

    def __init__(self, root: Path = ROOT, sources: tuple[Source, ...] = SOURCES) -> None:
        self.root, self.sources = Path(root), sources

    @cached_property
    def _loaded(self) -> list[tuple[Source, dict[str, str], dict[str, Callable], str]]:
        """Of every source with JSON: its blocks, its figures, and the digest of its numbers."""
        loaded = []
        for source in self.sources:
            paths = sorted((self.root / RESULTS).glob(source.files))
            if not paths:
                continue
            texts = {path.name: path.read_text() for path in paths}
            read = {name: json.loads(text) for name, text in texts.items()}
            numbers = read if "*" in source.files else next(iter(read.values()))
            module = importlib.import_module(source.module)
            digest = hashlib.blake2b(repr(sorted(texts.items())).encode(), digest_size=8)
            loaded.append(
                (source, module.blocks(numbers), module.figures(numbers), digest.hexdigest())
            )
        return loaded

    @cached_property
    def blocks(self) -> dict[str, str]:
        return {name: text for _, blocks, _, _ in self._loaded for name, text in blocks.items()}

    @cached_property
    def figures(self) -> dict[str, tuple[Callable, str]]:
        """Name -> the function that draws it, and the description that its files carry."""
        return {
            name: (draw, f"drawn from numbers {digest}")
            for _, _, figures, digest in self._loaded
            for name, draw in figures.items()
        }

    def text_of(self, name: str) -> str | None:
        """What block `name` says; None where no source knows it."""
        if name in self.blocks:
            return self.blocks[name]
        measured = [source for source, *_ in self._loaded]
        waiting = (s for s in self.sources if s not in measured)
        return UNMEASURED if any(s.owns(name) for s in waiting) else None

    def pages(self) -> Iterator[Path]:
        yield self.root / "README.md"
        yield from sorted((self.root / "docs").rglob("*.md"))

    def _rewritten(self, page: str) -> str:
        def put(found: re.Match) -> str:
            text = self.text_of(found["name"])
            if text is None:
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
            with style.style():
                drawn = draw()
            for path, old in zip(style.save(drawn, self._stem(name), description), before):
                if path.read_bytes() != old:
                    changed.append(path)
        return changed

    def problems(self) -> list[str]:
        """One line for everything in the tree that `write` would change or cannot make."""
        found = []
        for path in self.pages():
            found += [f"{path.relative_to(self.root)}: {what}" for what in self._wrong_in(path)]
        for name, (_, description) in self.figures.items():
            svg, png = self._files(name)
            missing = [p for p in (svg, png) if not p.exists()]
            found += [f"{p.relative_to(self.root)}: missing" for p in missing]
            if not missing and description not in svg.read_text():
                found.append(f"{svg.relative_to(self.root)}: drawn from other numbers")
        return found

    def _wrong_in(self, path: Path) -> Iterator[str]:
        page = path.read_text()
        for found in BLOCK.finditer(page):
            name, text = found["name"], self.text_of(found["name"])
            inline = not found["text"].startswith("\n")
            if text is None:
                yield f"no source knows block '{name}'"
            elif inline and "\n" in text:
                yield f"block '{name}' has several lines, its markers stand in one"
            elif inline and page[: found.start()].endswith("\n"):
                yield f"block '{name}' stands at the beginning of a line"
            elif self._rewritten(found[0]) != found[0]:
                yield f"block '{name}' is not what the numbers say"
        for marker in _MARKER.findall(BLOCK.sub("", page)):
            yield f"{marker} has no partner"

    def _stem(self, name: str) -> Path:
        return self.root / FIGURES / name

    def _files(self, name: str) -> list[Path]:
        return [self._stem(name).with_name(f"{name}.{suffix}") for suffix in style.FORMATS]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args(arguments)
    report = Report()
    if not options.check:
        for path in report.write():
            print(path.relative_to(report.root))
    problems = report.problems()
    print(*problems, sep="\n", end="\n" if problems else "", file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
