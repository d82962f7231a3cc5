"""The table of docs/backbones.md: every backbone with every family and way, as it says."""

import pytest

from tests.combinations import BACKBONES, PAGE, block, row, said

pytest.importorskip("transformers", reason="pip install pae[hf]")
pytest.importorskip("open_clip", reason="pip install pae[clip]")


@pytest.mark.parametrize("name", BACKBONES)
def test_row(name):
    assert row(name) == said()[name]


def test_the_page_is_its_table():
    assert said().keys() == BACKBONES.keys()
    assert block(said()) in PAGE.read_text(encoding="utf-8")
