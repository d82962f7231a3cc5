"""What a family may do besides giving prompt rows: head-space keys, adjusted, rewritten and
observed rows. Both engines must ask the same questions at the same places.
"""

import pytest
import torch
from torch import nn

import pae
from tests import tiny
from tests.tiny import assert_engines_agree, error, gradients, prompted

# an adjusted row needs a class token; all else does not
FEATURES = ["plain", "avg", "qk_norm", "registers", "avg_no_class_token", "head_width", "one_block"]
MEMORY = pae.engine.MEMORY_MODES


class WithKeys(tiny.Given):
    """Prompt rows and, in head space, keys and values; `sets` of them as in `Given`."""

    def __init__(self, counts, head_counts, sets=1, head_sets=1, group=None):
        super().__init__(counts, sets, group)
        self.head_counts, self.head_sets = head_counts, head_sets

    def bind(self, shape):
        super().bind(shape)
        self.kv = nn.ParameterList(
            nn.Parameter(torch.randn(self.head_sets, n, 2, shape.num_heads, shape.head_width))
            for n in self.head_counts
        )

    def head_keys_values(self, index, x):
        if self.head_counts[index] == 0:
            return None
        return self.kv[index][0] if self.head_sets == 1 else self.kv[index]


class Adjusting(pae.prompts.VPTDeep):
    """Adds learned rows to the k image rows the class row looked at most (per head mean)."""

    def __init__(self, num_tokens, k=3):
        super().__init__(num_tokens)
        self.k, self.seen = k, []

    def bind(self, shape):
        super().bind(shape)
        self.added = nn.Parameter(torch.randn(shape.depth, self.k, shape.width))

    def adjust_attended_rows(self, index, x, class_attention):
        self.seen.append(class_attention)
        assert class_attention.shape[0::2] == x.shape[:2]
        top = class_attention.mean(1).topk(self.k).indices
        index_of = top[..., None].expand(-1, -1, x.shape[-1])
        return x.scatter_add(1, index_of, self.added[index].expand_as(index_of).to(x.dtype))


class Rewriting(pae.prompts.VPTShallow):
    """Live rows that are mapped, and moved by the image's mean, between blocks."""

    def bind(self, shape):
        super().bind(shape)
        self.map = nn.Linear(shape.width, shape.width)

    def next_rows(self, index, rows, x):
        assert rows.shape[1] == self.num_tokens
        return torch.tanh(self.map(rows)) * index + x.mean(1, keepdim=True)


class Observing(pae.prompts.VPTDeep):
    """A penalty on what it was shown."""

    observed = frozenset({0, 2})

    def __init__(self, num_tokens):
        super().__init__(num_tokens)
        self.shown = {}

    def observe(self, index, x, class_query):
        self.shown[index] = (x, class_query)

    def penalty(self):
        return sum(x.square().mean() * (i + 1) + q.cos().sum() for i, (x, q) in self.shown.items())


class Everything(Adjusting):
    """All of it at once, with prompts that read the rows."""

    observed = frozenset({0, 1, 2})
    depends_on_input = True

    def bind(self, shape):
        super().bind(shape)
        self.kv = nn.Parameter(torch.randn(2, 2, shape.num_heads, shape.head_width))

    def head_keys_values(self, index, x):
        return self.kv if index != 1 else None

    def block_prompts(self, index, x):
        rows = super().block_prompts(index, x)
        return rows + x.mean(1, keepdim=True) if index else None

    def observe(self, index, x, class_query):
        self.shown = (index, x.shape, class_query.shape)


def depth(feature):
    return 1 if feature == "one_block" else 3


@pytest.mark.parametrize("wrt_images", [True, False])
@pytest.mark.parametrize("counts", [(0, 0, 0), (4, 0, 2)], ids=str)
@pytest.mark.parametrize("head_counts", [(3, 3, 3), (0, 2, 0)], ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_head_space_keys(feature, head_counts, counts, wrt_images):
    n = depth(feature)
    model = prompted(feature, WithKeys(counts[:n], head_counts[:n]))
    assert_engines_agree(model, tiny.images(model.backbone), wrt_images=wrt_images)


@pytest.mark.parametrize("head_sets", [1, 3])
@pytest.mark.parametrize("sets, group", [(1, None), (3, None), (2, [1, 0, 1])])
def test_head_space_keys_of_sets(sets, group, head_sets):
    """Every pairing of shared, per-sample and grouped rows with shared and per-sample keys."""
    model = prompted("plain", WithKeys([2, 2, 2], [3, 0, 1], sets, head_sets, group))
    assert_engines_agree(model, tiny.images(model.backbone))


def test_head_space_keys_matter_in_every_block():
    model = prompted("plain", WithKeys([0, 0, 0], [3, 3, 3]))
    _, grads = gradients(model, tiny.images(model.backbone), "fast")
    assert all(grads[f"prompts.kv.{i}"].norm() > 1e-6 for i in range(3))


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("feature", [f for f in FEATURES if f != "avg_no_class_token"])
def test_adjusted_rows(feature, memory):
    model = prompted(feature, Adjusting(4))
    grads = 2e-2 if memory == "recompute8" else None
    assert_engines_agree(model, tiny.images(model.backbone), grads=grads, memory=memory)
    assert_engines_agree(
        model, tiny.images(model.backbone), grads=grads, memory=memory, wrt_images=False
    )


@pytest.mark.parametrize("feature", ["avg_no_class_token", "registers_no_class_token"])
def test_no_class_token_no_class_attention(feature):
    with pytest.raises(ValueError, match=r"prompts \(Adjusting\).*no class token"):
        prompted(feature, Adjusting(2))


def test_class_attention_is_a_softmax_over_all_keys():
    """Both engines show the same; what is missing to one is what the prompts got."""
    model = prompted("registers", Adjusting(4))
    seen = {}
    for engine in ("reference", "fast"):
        model.prompts.seen = []
        model(tiny.images(model.backbone), engine=engine)
        seen[engine] = model.prompts.seen
    assert len(seen["fast"]) == 2
    for got, expected in zip(seen["fast"], seen["reference"], strict=True):
        assert error(got, expected) < 1e-9
        assert not got.requires_grad
        mass = got.sum(-1)
        assert ((mass > 0.05) & (mass < 0.95)).any() and (mass < 1).all()


def test_the_class_attention_is_the_blocks_own():
    """Against the maps that the blocks form when asked."""
    model = prompted("plain", Adjusting(0))
    maps = []
    for block in model.backbone.blocks:
        block.attn.register_forward_hook(
            lambda attn, inputs, _: maps.append(attention_map(attn, inputs[0]))
        )
    model(tiny.images(model.backbone))
    for got, expected in zip(model.prompts.seen, maps, strict=False):
        assert error(got, expected[:, :, 0]) < 1e-9


def attention_map(attn, x):
    qkv = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1))
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    return (attn.q_norm(q) @ attn.k_norm(k).mT * attn.scale).softmax(-1)


@pytest.mark.parametrize("feature", FEATURES)
def test_rewritten_rows(feature):
    model = prompted(feature, Rewriting(4))
    assert_engines_agree(model, tiny.images(model.backbone))
    assert_engines_agree(model, tiny.images(model.backbone), wrt_images=False)


def test_rewritten_rows_are_not_those_of_vpt_shallow():
    model = prompted("plain", Rewriting(4))
    plain = prompted("plain", pae.prompts.VPTShallow(4))
    x = tiny.images(model.backbone)
    assert error(model(x), plain(x)) > 1e-2


@pytest.mark.parametrize("feature", [f for f in FEATURES if f != "one_block"])
def test_observed_rows(feature):
    """The penalty's gradient reaches the prompts of all blocks below, in both engines."""
    model = prompted(feature, Observing(4))
    x = tiny.images(model.backbone)
    results = {}
    for engine in ("reference", "fast"):
        model.zero_grad()
        loss = model(x, engine=engine).square().sum() + model.penalty()
        loss.backward()
        results[engine] = loss.detach(), model.prompts.tokens.grad
    assert error(results["fast"][0], results["reference"][0]) < 1e-9
    assert error(results["fast"][1], results["reference"][1]) < 1e-7
    assert set(model.prompts.shown) == {0, 2}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("feature", ["plain", "avg", "qk_norm", "registers", "head_width"])
def test_everything_at_once(feature, dtype):
    model = prompted(feature, Everything(4), dtype=dtype)
    assert_engines_agree(model, tiny.images(model.backbone))
    rows = model.prompts.shown[1]
    assert model.prompts.shown[0] == 2 and rows[1] == model.view.shape.num_tokens


@pytest.mark.parametrize("family", [lambda: WithKeys([1] * 3, [2] * 3), lambda: Everything(3)])
def test_without_gradients_under_autocast_and_compiled(family):
    model = prompted("plain", family(), dtype=torch.float32)
    x = tiny.images(model.backbone)
    with torch.no_grad():
        expected = model(x)
        assert error(pae.fast_forward(model, x), expected) < 1e-5
        with torch.autocast("cpu", torch.bfloat16):
            assert error(pae.fast_forward(model, x), expected) < 0.1
    compiled = torch.compile(model, backend="aot_eager")
    assert error(pae.fast_forward(compiled, x), expected) < 1e-5


def test_shape_says_what_families_need():
    shape = tiny.prompted("registers").view.shape
    assert (shape.num_prefix_tokens, shape.grid, shape.head_width) == (3, (4, 4), 8)
    assert tiny.prompted("head_width").view.shape.head_width == 6
