"""What tests of sweeps share."""

import pytest

from tests.sweep.specs import write_spec
from tests.train.helpers import save_shades


@pytest.fixture(scope="module")
def shades(tmp_path_factory):
    return save_shades(tmp_path_factory.mktemp("shades"))


@pytest.fixture
def spec(tmp_path, shades):
    """spec(top, below) writes a spec over the shades and returns its path."""
    return lambda *text, **more: write_spec(tmp_path / "lrs.toml", shades, *text, **more)
