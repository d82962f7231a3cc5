"""`pae models`: what it says of models that are taken, taken by one engine, or not; its table."""

import re

import pytest

from docs import models as page
from pae.train.cli import main
from pae.train.models import Row, asked, summary, survey


def test_rows():
    rows = {row.name: row for row in survey("vit_tiny_patch16_[23]*")}
    assert {"vit_tiny_patch16_224", "vit_tiny_patch16_384"} <= rows.keys()
    assert all(row.engine == "fast" and row.why == "" for row in rows.values())
    tags = list(survey("vit_tiny_patch16_224*", pretrained=True))
    assert len(tags) > 1 and all("." in row.name and row.engine == "fast" for row in tags)


def test_what_is_no_vision_transformer():
    row = asked("resnet10t")
    assert row.engine == "none" and "resnet" not in row.why
    assert row.why == "ResNet has no attribute 'blocks', which a plain timm ViT has"


def test_other_libraries_are_listed_without_them():
    rows = {row.name: row for row in survey("dinov2model")}
    assert rows == {"transformers.Dinov2Model": Row("transformers.Dinov2Model", "fast")}
    (step,) = (row for row in survey("CLIPModel") if row.engine == "none")
    assert step == Row("transformers.CLIPModel", "none", "give its vision_model")


def test_command(capsys):
    assert main(["models", "vit_tiny_patch16_224"]) == 0
    *rows, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"vit_tiny_patch16_224 +fast", rows[0])
    assert last == "1 models: 1 in both engines, 0 in the reference alone, 0 not"
    assert main(["models", "no_such_model"]) == 2
    assert "no model's name matches 'no_such_model'" in capsys.readouterr().err
    assert summary([Row("a", "none"), Row("b", "reference")]).startswith("2 models: 0 in both")


@pytest.mark.parametrize("file", ["vision_transformer_sam", "naflexvit"])
def test_the_table_is_what_the_command_says(file):
    own = [asked(name) for name in page.names()[file]]
    line = next(r for r in page.table({file: own}).splitlines() if r.startswith(f"| {file} |"))
    assert line in page.PAGE.read_text(encoding="utf-8")


def test_the_table_has_every_file():
    text = page.PAGE.read_text(encoding="utf-8")
    assert all(f"| {file} |" in text for file in page.FILES if page.names()[file])
