"""APT: keys and values shared by all heads, their scales, and where they act."""

import pytest
import torch
import torch.nn.functional as F

import pae
from pae.prompts import APT
from tests import tiny
from tests.tiny import error, gradients


def prompted(*args, feature="plain", **kwargs):
    torch.manual_seed(0)
    return pae.PromptedViT(tiny.backbone(feature), APT(*args, **kwargs)).train()


def test_attention_by_hand():
    """One block, against softmax(q [k_p; k]^T) [v_p; v] spelled out head by head."""
    made = prompted(3, feature="one_block")
    with torch.no_grad():
        made.prompts.scales.uniform_(0.5, 2)
        made.prompts.keys.normal_()
    vit, family = made.backbone, made.prompts
    x = made.view.embed(tiny.images(vit))
    block, attn = vit.blocks[0], vit.blocks[0].attn
    qkv = attn.qkv(block.norm1(x)).unflatten(-1, (3, 4, 8))
    heads = []
    for h in range(4):
        q, k, v = qkv[:, :, :, h].unbind(2)
        s = family.scales[0].clamp(min=1)
        keys = torch.cat([(family.keys[0] * s[0][:, None]).expand(3, -1, -1), k], dim=1)
        values = torch.cat([(family.values[0] * s[1][:, None]).expand(3, -1, -1), v], dim=1)
        heads.append((q @ keys.mT * 8**-0.5).softmax(-1) @ values)
    x = x + attn.proj(torch.cat(heads, -1))
    x = x + block.mlp(block.norm2(x))
    expected = made.head(vit.norm(x)[:, 0])
    for engine in ("reference", "fast"):
        assert error(made(tiny.images(vit), engine=engine), expected) < 1e-9


def test_a_scale_below_one_does_nothing():
    made = prompted(3)
    x = tiny.images(made.backbone)
    with torch.no_grad():
        made.prompts.scales.fill_(0.5)
    low, grads = gradients(made, x, "fast")
    assert not grads["prompts.scales"].any()
    with torch.no_grad():
        made.prompts.scales.fill_(1.0)
    one, grads = gradients(made, x, "fast")
    assert torch.equal(low, one)
    half = grads["prompts.scales"]
    with torch.no_grad():
        made.prompts.scales.fill_(1 + 1e-9)
    _, grads = gradients(made, x, "fast")
    assert error(2 * half, grads["prompts.scales"]) < 1e-7  # a tie is split


def test_only_the_chosen_blocks_have_prompts():
    made = prompted(3, start=1, end=1)
    x = tiny.images(made.backbone)
    assert made.prompts.keys.shape == (1, 3, 8)
    assert [made.prompts.head_keys_values(i, x) is None for i in range(3)] == [True, False, True]


def test_start_and_size():
    made = prompted(50)
    own = {n: tuple(q.shape) for n, q in made.prompts.named_parameters()}
    assert own == {"keys": (3, 50, 8), "values": (3, 50, 8), "scales": (3, 2, 50)}
    bound = (6 / (3 * 4 * 4 + 8)) ** 0.5
    for p in (made.prompts.keys, made.prompts.values):
        assert p.abs().max() <= bound and abs(p.std() / bound - 3**-0.5) < 0.05
    assert made.prompts.scales.eq(1).all()


def test_many_tokens_and_mean_pooling():
    """As on video tokens: no class token, all rows are read at the end."""
    made = prompted(3, feature="avg_no_class_token")
    tiny.assert_engines_agree(made, tiny.images(made.backbone))


def test_learns():
    made = prompted(4).to(torch.float64)
    x, y = tiny.images(made.backbone, batch=8), torch.arange(8) % 5
    optimiser = torch.optim.Adam(made.prompts.parameters(), lr=0.1)
    first = None
    for _ in range(15):
        loss = F.cross_entropy(pae.fast_forward(made, x), y)
        first = first or loss.item()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.8 * first


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"num_tokens": 0}, "num_tokens must be at least 1"),
        ({"num_tokens": 2, "start": 2, "end": 1}, "start and end must satisfy"),
        ({"num_tokens": 2, "end": 3}, "start and end must satisfy .* < 3, got 0 and 3"),
        ({"num_tokens": 2, "dropout": 1.0}, "dropout must be"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        prompted(**kwargs)


def test_mpa_says_why_not():
    made = prompted(2)
    with pytest.raises(ValueError, match="prompts"):
        pae.mpa_init(made, tiny.images(made.backbone), torch.zeros(3, dtype=torch.int64), 4, 4)
