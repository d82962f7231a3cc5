"""The Python on a page of the documentation, run as a reader would run it.

Blocks without a title run one after the other in one namespace. A block whose title is a path is
that file of the repository, as the page adds it: it is written to a folder that its package is
searched in as well. A block behind `<!-- snippet: needs a GPU -->`, or needs a package by its name,
is only compiled without it.

A reader has images, labels, pretrained and published weights, and launches under torchrun. Here
all are random, and `timm.create_model` makes a small backbone for whatever name it is given; see
`given`, `small_model` and `ENVIRONMENT`.

    python -m tests.snippets docs/add-an-op.md      in a process of its own
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import timm
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

import pae

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
_BLOCK = re.compile(
    r"(?:<!-- snippet: needs (?P<needs>a GPU|\w+) -->\n)?"
    r'^(?P<margin> *)```python(?: title="(?P<title>[^"]+)")?\n(?P<code>.*?)^(?P=margin)```$',
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Snippet:
    """A block of Python; `line` is where its code begins on the page."""

    page: Path
    line: int
    title: str | None
    code: str
    needs: str | None  # "a GPU", or a package

    @property
    def can_run(self) -> bool:
        """Whether what it needs is here; it is compiled all the same."""
        if self.needs == "a GPU":
            return torch.cuda.is_available()
        return self.needs is None or importlib.util.find_spec(self.needs) is not None

    def compiled(self):
        """Code whose tracebacks point at the page."""
        return compile("\n" * (self.line - 1) + self.code, str(self.page), "exec")


def snippets(page: Path) -> list[Snippet]:
    """All blocks of Python of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Snippet(
            page,
            text.count("\n", 0, match.start("code")) + 1,
            match["title"],
            textwrap.dedent(match["code"]),
            match["needs"],
        )
        for match in _BLOCK.finditer(text)
    ]


def small_model(name: str, pretrained: bool = False, **options) -> VisionTransformer:
    """What `timm.create_model` gives on the pages: few pixels, few thin blocks."""
    torch.manual_seed(0)
    made = VisionTransformer(
        img_size=112, patch_size=28, embed_dim=32, depth=3, num_heads=4, num_classes=1000
    )
    if options.get("num_classes", 1000) != 1000:  # the blocks are the same with any head
        made.reset_classifier(options["num_classes"])
    return made


def given(folder: Path) -> dict:
    """What a reader has before the first line: a batch, a loader, a model; in `folder`, prompts of
    that size that the published code of VPT has trained, a checkpoint of ours, and a photograph.
    """
    torch.manual_seed(0)
    images, labels = torch.randn(2, 3, 112, 112), torch.tensor([3, 1])
    dataset = torch.utils.data.TensorDataset(images, labels)
    published = {
        "enc.transformer.prompt_embeddings": torch.randn(1, 4, 32),
        "enc.transformer.deep_prompt_embeddings": torch.randn(2, 4, 32),
        "head.last_layer.weight": torch.randn(5, 32),
        "head.last_layer.bias": torch.randn(5),
    }
    torch.save(published, folder / "vpt.pth")
    trained = pae.PromptedViT(small_model("any"), pae.prompts.VPTDeep(4), num_classes=5)
    trained.task = pae.TaskInfo(
        classes=("ant", "bee", "cat", "dog", "elk"),
        input_size=(3, 112, 112),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        interpolation="bicubic",
        crop_pct=1.0,
        crop_mode="squash",
        backbone={"model": "vit_base_patch16_224.augreg_in21k"},
    )
    trained.save(folder / "best.safetensors")
    Image.new("RGB", (60, 40)).save(folder / "photo.png")
    return {
        "__name__": "page",
        "torch": torch,
        "pae": pae,
        "images": images,
        "labels": labels,
        "loader": torch.utils.data.DataLoader(dataset, batch_size=1),
        "vit": small_model("any"),
        "model": pae.PromptedViT(small_model("any"), pae.prompts.VPTDeep(4), num_classes=5),
    }


@contextlib.contextmanager
def _files(found: list[Snippet], folder: Path) -> Iterator[None]:
    """The titled blocks as files that can be imported; gone again afterwards."""
    grafted, modules = [], set(sys.modules)
    for snippet in found:
        path = folder / snippet.title
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(snippet.code, encoding="utf-8")
        *parents, _ = Path(snippet.title).parts
        while not (ROOT / Path(*parents)).is_dir():
            parents.pop()  # a package that the page itself adds
        package = importlib.import_module(".".join(parents))
        if str(folder / Path(*parents)) not in package.__path__:
            package.__path__.append(str(folder / Path(*parents)))
            grafted.append(package)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for package in grafted:
            package.__path__.pop()
        for name in set(sys.modules) - modules:
            if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]


def run(page: Path, folder: Path) -> int:
    """Run a page's Python in `folder`; the number of blocks. Raises what a block raises."""
    found = snippets(page)
    namespace = given(folder)
    before = Path.cwd()
    with (
        _files([s for s in found if s.title], folder),
        mock.patch.object(timm, "create_model", small_model),
        mock.patch.dict(os.environ, ENVIRONMENT),
    ):
        os.chdir(folder)
        try:
            for snippet in found:
                code = snippet.compiled()
                if not snippet.title and snippet.can_run:
                    exec(code, namespace)
        finally:
            os.chdir(before)
    return len(found)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(run(Path(sys.argv[1]).resolve(), Path(scratch)), "blocks")
