"""Which backbone goes with what: a table of docs/backbones.md, written by trying each pair.

    python -m tests.combinations

`tests/pae/test_combinations.py` tries them all again. A pair works, equal in both engines, or is
refused with one line, which stands below the table.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

import pae
from pae.methods.nsp2 import NullSpace
from pae.prompts import METHODS, PromptFamily
from tests import libraries, timm_kinds, tiny
from tests.released import Model
from tests.tiny import assert_engines_agree, error

PAGE = Path(__file__).parents[1] / "docs" / "backbones.md"
_BLOCK = re.compile(r"(<!-- combinations -->\n).*(<!-- end of combinations -->)", re.DOTALL)
REFUSALS = (pae.UnsupportedBackbone, ValueError)


def _timm(kind: str) -> Callable[[], nn.Module]:
    return lambda: timm_kinds.build(kind)


def _other(name: str) -> Callable[[], nn.Module]:
    return lambda: libraries.model(name)


SWIN = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 16, "num_classes": 5}
SWIN |= {"depths": (2, 2), "num_heads": (2, 4)}

# one of each kind of container, block or readout
BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "timm ViT": lambda: tiny.backbone("plain").eval(),
    "timm ViT, average pooled": lambda: tiny.backbone("avg").eval(),
    "timm EVA02": _timm("eva02-b"),
    "timm DINOv3": _timm("dinov3"),
    "timm BEiT": _timm("beit"),
    "timm ViTamin": _timm("vitamin"),
    "timm ViT, norms behind": _timm("post-norm"),
    "timm ViT, parallel": _timm("parallel"),
    "timm ViT, differential": _timm("differential"),
    "timm NaFlexViT": _timm("naflex"),
    "transformers ViT": _other("ViT"),
    "transformers DINOv2": _other("DINOv2, registers, classes"),
    "transformers CLIP": _other("CLIP"),
    "transformers SigLIP": _other("SigLIP"),
    "transformers BEiT": _other("BEiT"),
    "transformers VideoMAE": _other("VideoMAE, classes"),
    "transformers ViViT": _other("ViViT"),
    "open_clip": _other("open_clip"),
    "torchvision": _other("torchvision"),
    "released VPT": lambda: Model(count=0).double().eval(),
    "timm Swin": lambda: tiny.filled(SwinTransformer(**SWIN)).double().eval(),
}


def inputs(name: str, module: nn.Module, batch: int = 3) -> Tensor:
    """Images, or clips, of the size of the backbone."""
    if name.startswith("timm"):
        some = timm_kinds.images(module)
        return torch.cat([some, some.flip(0)])[:batch]
    return libraries.images(batch, name=name.removeprefix("transformers "))


def prompted(name: str, family: PromptFamily | None = None, **options) -> pae.PromptedViT:
    """A model with prompts as large as its rows, and a head, in training mode."""
    return tiny.over(BACKBONES[name](), family, **options)


def _family(name: str, method: str) -> None:
    model = prompted(name, tiny.small(METHODS[method])).eval()
    x = inputs(name, model.backbone)
    with torch.no_grad():
        assert error(model(x, engine="fast"), model(x)) < 1e-9


def _mpa(name: str) -> None:
    model = prompted(name)
    x, before = inputs(name, model.backbone, 4), model.prompts.tokens.detach().clone()
    found = pae.mpa_init(model, x, torch.arange(4), window=4, stride=4)
    assert torch.isfinite(found.losses).all() and not torch.equal(model.prompts.tokens, before)


def _spt(name: str) -> None:
    model = prompted(name)
    before = model.prompts.tokens.detach().clone()
    pae.spt_init(model, inputs(name, model.backbone, 4), method="mean_pooling")
    assert not torch.equal(model.prompts.tokens, before)


def _kld(name: str) -> None:
    model = prompted(name, kld=pae.KLD(8))
    loss = model(inputs(name, model.backbone), engine="fast").square().mean() + model.penalty()
    loss.backward()
    assert model.kld.K.grad.abs().sum() > 0 and model.prompts.tokens.grad.abs().sum() > 0


def _nsp2(name: str) -> None:
    model = prompted(name)
    space = NullSpace(model)
    space.observe([inputs(name, model.backbone, 4)])
    assert all(torch.isfinite(p).all() for p in space.projections())


def _file(name: str) -> None:
    model = prompted(name).eval()
    x = inputs(name, model.backbone)
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "a.safetensors")
        again = pae.PromptedViT.from_file(Path(folder) / "a.safetensors", BACKBONES[name]())
    with torch.no_grad():
        assert torch.equal(again.eval()(x), model(x))


def _agrees(**options) -> Callable[[str], None]:
    def check(name: str) -> None:
        model = prompted(name, **options)
        assert_engines_agree(model, inputs(name, model.backbone))

    return check


WAYS: dict[str, Callable[[str], None]] = {
    "MPA": _mpa,
    "SPT": _spt,
    "KLD": _kld,
    "NSP2": _nsp2,
    "a file": _file,
    '`train_backbone="biases"`': _agrees(train_backbone="biases"),
    '`"da-vpt+"`': _agrees(train_backbone="da-vpt+"),
    '`pool="all"`': _agrees(pool="all"),
}


def refusal(check: Callable[..., None], *given: str) -> str:
    """The line with which it is refused; nothing when it works."""
    try:
        check(*given)
    except REFUSALS as error:
        line = str(error)
        assert "\n" not in line, line
        return line
    return ""


def row(name: str) -> tuple[dict[str, str], dict[str, str]]:
    """Of a backbone: the refusals of families by method, and those of each way."""
    families = {method: refusal(_family, name, method) for method in METHODS}
    return families, {way: refusal(check, name) for way, check in WAYS.items()}


def block(rows: dict[str, tuple[dict[str, str], dict[str, str]]]) -> str:
    """The table and the lines below it."""
    lines = {}

    def note(line: str) -> str:
        return f"({lines.setdefault(line, len(lines) + 1)})"

    def families(refused: dict[str, str]) -> str:
        left = [f"{method} {note(line)}" for method, line in refused.items() if line]
        return f"all but {', '.join(left)}" if left else "all"

    names = ["backbone", "families", *WAYS]
    table = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for name, (by_method, by_way) in rows.items():
        cells = [note(line) if line else "yes" for line in by_way.values()]
        table.append(f"| {name} | {families(by_method)} | {' | '.join(cells)} |")
    notes = [f"{number}. `{line}`" for line, number in lines.items()]
    return "\n".join([*table, "", *notes])


def page(rows: dict[str, tuple[dict[str, str], dict[str, str]]]) -> str:
    """The page with its table."""
    before = PAGE.read_text(encoding="utf-8")
    return _BLOCK.sub(lambda m: f"{m[1]}\n{block(rows)}\n\n{m[2]}", before)


def said() -> dict[str, tuple[dict[str, str], dict[str, str]]]:
    """What the page says."""
    found = _BLOCK.search(PAGE.read_text(encoding="utf-8"))
    assert found is not None
    notes = dict(re.findall(r"^(\d+)\. `(.*)`$", found[0], re.MULTILINE))
    rows = {}
    for line in found[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if len(cells) == len(WAYS) + 2 and cells[0] in BACKBONES:
            left = dict(re.findall(r"([a-z0-9-]+) \((\d+)\)", cells[1]))
            by_method = {
                method: notes[left[method]] if method in left else "" for method in METHODS
            }
            by_way = {
                w: "" if c == "yes" else notes[c.strip("()")] for w, c in zip(WAYS, cells[2:])
            }
            rows[cells[0]] = by_method, by_way
    return rows


def main(names: Iterable[str] = tuple(BACKBONES)) -> None:
    PAGE.write_text(page({name: row(name) for name in names}), encoding="utf-8")


if __name__ == "__main__":
    main()
