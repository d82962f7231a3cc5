"""What the documentation claims in tables is what the library does."""

import re
from pathlib import Path

import pytest
import tiny
import torch

import pae
from pae.train.settings import FAMILIES

ROOT = Path(__file__).parent.parent
ARGUMENTS = {"BPTDeep": (4, 4), "BPTShallow": (4, 4), "DAVPT": (4, 4, 5)}


def rows():
    text = (ROOT / "docs" / "families.md").read_text()
    cells = [
        [c.strip() for c in line.strip("|\n").split("|")]
        for line in text.splitlines()
        if line.startswith("| `")
    ]
    return {row[0].strip("`"): row[1:] for row in cells}


def test_every_family_has_a_row():
    table = rows()
    assert {name: row[0].strip("`") for name, row in table.items()} == {
        name: method for method, name in FAMILIES.items()
    }
    classes = {
        name
        for name in pae.prompts.__all__
        if isinstance(getattr(pae.prompts, name), type)
        and issubclass(getattr(pae.prompts, name), pae.prompts.PromptFamily)
    }
    assert classes - {"PromptFamily"} == set(table)


def made(name, kld=None):
    family = getattr(pae.prompts, name)(*ARGUMENTS.get(name, (4,)))
    return pae.PromptedViT(tiny.backbone(dtype=torch.float32), family, kld).train()


@pytest.mark.parametrize("name", rows())
def test_kld_column(name):
    if rows()[name][3].startswith("yes"):
        model = made(name, pae.KLD(dim=4))
        pae.fast_forward(model, tiny.images(model.backbone))
        model.prompts.see_labels(torch.tensor([0, 1, 2]))
        model.kld.terms(model.prompts.raw_prompts())[0].backward()
        return
    with pytest.raises(ValueError, match="kld"):
        made(name, pae.KLD(dim=4))


@pytest.mark.parametrize("name", rows())
def test_mpa_and_spt_column(name):
    model = made(name)
    x, y = tiny.images(model.backbone), torch.tensor([0, 1, 2])
    before = [p.clone() for p in model.prompts.parameters()]
    starts = (
        lambda: pae.mpa_init(model, x, y, window=4, stride=3, progress=False),
        lambda: pae.spt_init(model, x),
    )
    for start in starts:
        if rows()[name][4].startswith("yes"):
            start()
            changed = [not torch.equal(a, b) for a, b in zip(before, model.prompts.parameters())]
            assert any(changed)
        else:
            with pytest.raises(ValueError, match=r"model\.prompts"):
                start()


@pytest.mark.parametrize("name", rows())
def test_column_of_who_shares_prompts(name):
    model = made(name)
    seen = {}
    view, family = model.view, model.prompts
    for i, block in enumerate(view.blocks):
        block.norm1.register_forward_pre_hook(lambda _, args, i=i: seen.update({i: args[0]}))
    if name == "APT":  # in head space: no rows to look at
        assert family.head_keys_values(0, tiny.images(model.backbone)).dim() == 4
        assert rows()[name][2] == "batch"
        return
    model.eval()
    with torch.no_grad():
        for parameter in family.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        model(tiny.images(model.backbone))
    # in the second block, so that what was made of an image's rows is seen; living rows are the
    # image's own from the first block on, whoever gave them
    index = 0 if family.enters_sequence and not family.rewrites_rows else 1
    prompts = seen[index][:, view.num_prefix_tokens :][:, :4]
    shared = torch.equal(prompts[0], prompts[1])
    assert shared == (rows()[name][2] == "batch")


def test_links_point_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize(
    "name", re.findall(r"`pae\.([\w.]+)`", (ROOT / "docs" / "families.md").read_text())
)
def test_names_exist(name):
    thing = pae
    for part in name.split("."):
        thing = getattr(thing, part)
