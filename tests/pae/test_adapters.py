"""Adapters in a backbone: merged ones are weights, others are named and run as they are."""

import copy

import pytest
import torch
from torch import nn

import pae
from pae.prompts import VPTDeep
from tests.libraries import images, model, own_output, version_4
from tests.tiny import backbone, error, gradients, refused
from tests.tiny import images as timm_images


def lora(peft, targets):
    return peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)


def dora(peft, targets):
    return peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, use_dora=True)


def ia3(peft, targets):
    own = {"feedforward_modules": targets[-1:], "init_ia3_weights": False}
    return peft.IA3Config(target_modules=targets, **own)


@pytest.mark.parametrize("config", [lora, dora, ia3])
def test_adapters_are_merged_or_named(config):
    peft = pytest.importorskip("peft", reason="pip install peft")
    vit = backbone("plain")
    x = timm_images(vit)
    torch.manual_seed(0)  # of what peft makes
    adapted = peft.get_peft_model(vit, config(peft, ["qkv", "fc2"])).eval()
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_" in name or "ia3_" in name:
                p.add_(0.3 * torch.randn_like(p))
    expected = adapted(x)
    message = "PeftModel of peft wraps a backbone: give merge_and_unload() of it, or"
    refused(pae.UnsupportedBackbone, message, lambda: pae.PromptedViT(adapted, VPTDeep(0)))

    named = r"blocks\.0\.attn\.qkv is Linear of peft, an adapter that is not merged"
    apart = copy.deepcopy(adapted).get_base_model()
    with pytest.warns(UserWarning, match=named):
        made = pae.PromptedViT(apart, VPTDeep(2))
    with pytest.raises(pae.UnsupportedBackbone, match=named):
        made(x, engine="fast")
    values, grads = gradients(made, x, "reference")

    unadapted = pae.PromptedViT(backbone("plain"), VPTDeep(0))
    merged = adapted.merge_and_unload()
    both = pae.PromptedViT(merged, VPTDeep(2)).train()
    both.load_state_dict({k: v for k, v in made.state_dict().items() if k[:4] != "back"}, False)
    got, own = gradients(both, x, "fast")
    assert error(got, values) < 1e-9 and error(unadapted(x), expected) > 1e-3
    assert error(own["prompts.tokens"], grads["prompts.tokens"]) < 1e-7
    nothing = pae.PromptedViT(apart_of(both), VPTDeep(0))
    assert error(nothing(x, engine="fast"), expected) < 1e-9


def apart_of(both):
    """Its backbone, with its head again."""
    vit = copy.deepcopy(both.backbone)
    vit.head = copy.deepcopy(both.head)
    return vit


def test_adapters_of_other_libraries_run_as_they_are():
    peft = pytest.importorskip("peft", reason="pip install peft")
    pytest.importorskip("transformers", reason="pip install pae[hf]")
    query = "query" if version_4() else "q_proj"
    vit = peft.get_peft_model(model("ViT"), lora(peft, [query])).eval().get_base_model()
    expected = own_output(vit, images())
    named = rf"blocks\.0\.attention\.(attention\.)?{query} is Linear of peft"
    with pytest.warns(UserWarning, match=named):
        made = pae.PromptedViT(vit, VPTDeep(0), num_classes=3)
    assert error(made.features(images()), expected) < 1e-12
    with pytest.raises(pae.UnsupportedBackbone, match=named):
        made(images(), engine="fast")


class Adapter(nn.Module):
    """A bottleneck behind a part of a block, which it wraps."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.down, self.up = inner, nn.Linear(32, 4), nn.Linear(4, 32)

    def forward(self, rows, **options):
        rows = self.inner(rows, **options)
        return rows + self.up(self.down(rows).relu())


@pytest.mark.parametrize("part, missing", [("mlp", "fc1"), ("attn", "qkv")])
def test_modules_that_wrap_a_part_are_named(part, missing):
    vit = backbone("plain")
    setattr(vit.blocks[1], part, Adapter(getattr(vit.blocks[1], part)))
    vit, x = vit.double().eval(), timm_images(vit)
    expected = vit(x)
    named = rf"blocks\.1\.{part} \(Adapter\) has no attribute '{missing}'"
    with pytest.warns(UserWarning, match=named):
        made = pae.PromptedViT(vit, VPTDeep(0))
    assert error(made(x), expected) < 1e-12
    with pytest.raises(pae.UnsupportedBackbone, match=named):
        made(x, engine="fast")
