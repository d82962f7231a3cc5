"""What a family says of itself: its config, and the name it is registered by."""

import json

import pytest
import torch
from torch import nn

import pae
from pae.prompts import METHODS, VPTDeep, build, register
from tests import tiny
from tests.tiny import prompted, refused

# ---- config


class Kept(VPTDeep):
    def __init__(self, num_tokens, where, table=None):
        super().__init__(num_tokens)
        self.where, self.table = where, table


def test_config_is_read_from_the_constructor():
    made = Kept(2, (1, (2, 3)), {"a": [None, 1.5, True]})
    assert made.config() == {"num_tokens": 2, "where": [1, [2, 3]], "table": made.table}
    assert json.loads(json.dumps(made.config())) == made.config()
    assert Kept(**made.config()).config() == made.config()
    assert repr(made).startswith("Kept(num_tokens=2, where=[1, [2, 3]], ")


@pytest.mark.parametrize("method", METHODS)
def test_config_of_shipped_families_is_their_constructor(method):
    made = tiny.small(METHODS[method])
    again = METHODS[method](**json.loads(json.dumps(made.config())))
    assert again.config() == made.config() and repr(again) == repr(made)


def test_what_config_cannot_read():
    class Forgets(VPTDeep):
        def __init__(self, num_tokens, scale):
            super().__init__(num_tokens)

    class Anything(VPTDeep):
        def __init__(self, *counts):
            super().__init__(counts)

    refused(
        TypeError, "Forgets.config() needs argument 'scale' as an attribute of that name",
        Forgets(2, 3.0).config,
    )  # fmt: skip
    refused(
        TypeError, "Kept.config(): argument 'where' must be a JSON value, got Tensor",
        Kept(2, torch.zeros(2)).config,
    )  # fmt: skip
    refused(TypeError, "Anything.config() must be overridden", Anything(1, 2, 3).config)
    assert repr(Anything(1, 2, 3)) == "Anything()"


# ---- registration


@pytest.fixture
def registry(monkeypatch):
    before = dict(METHODS)
    yield METHODS
    METHODS.clear()
    METHODS.update(before)


def test_a_family_of_ones_own(registry, tmp_path):
    """One file and one line: checkpoints and the command line know it."""

    @register("my-method")
    class MyVPT(VPTDeep):
        def __init__(self, num_tokens, scale=1.0):
            super().__init__(num_tokens)
            self.scale = scale

    assert registry["my-method"] is MyVPT
    made = prompted("plain", MyVPT(3, 2.5))
    made.save(tmp_path / "a.safetensors")
    again = pae.PromptedViT.from_file(tmp_path / "a.safetensors", tiny.backbone())
    assert type(again.prompts) is MyVPT and again.prompts.scale == 2.5
    del registry["my-method"]
    with pytest.raises(pae.CheckpointError, match=r"got 'MyVPT': a family of one's own is known"):
        pae.PromptedViT.from_file(tmp_path / "a.safetensors", tiny.backbone())


def test_names_are_unique(registry):
    class Own(VPTDeep):
        pass

    refused(
        ValueError, "method 'apt' of tests.pae.test_registration.", lambda: register("apt")(Own)
    )
    Own.__name__ = "APT"
    refused(
        ValueError,
        "has the name of pae.prompts.apt.APT, and checkpoints build families by it",
        lambda: register("other")(Own),
    )
    assert "other" not in registry


def test_a_class_that_is_defined_again_takes_its_place(registry):
    def cell(method):
        @register(method)
        class Own(VPTDeep):
            pass

        return Own

    cell("mine")
    again = cell("mine")
    assert registry["mine"] is again
    renamed = cell("other")
    assert registry["other"] is renamed and "mine" not in registry


@pytest.mark.parametrize(
    "method", ["", "My", "a b", "a_b", "-a", "full", "linear", "compare", None, 3]
)
def test_names_that_cannot_be(method, registry):
    refused(ValueError, "method must", lambda: register(method))


def test_only_families_are_registered(registry):
    refused(TypeError, "must be a subclass of PromptFamily", lambda: register("a")(nn.Linear))
    refused(ValueError, "name must be one of", lambda: build("PromptFamily", {}))
