"""Two towers: the text tower's view against the models themselves, textbook and fast engine."""

import copy
from functools import partial
from itertools import combinations, pairwise

import pytest
import torch

import pae
from pae import text
from pae.backbones.clip_text import read_text
from pae.prompts import VPTDeep
from tests import clips
from tests.clips import CAUSAL, CLIPS, NAMES, Context, clip, prompted
from tests.errors import error
from tests.libraries import images
from tests.tiny import assert_engines_agree, refused

pytest.importorskip("transformers", reason="pip install pae[hf]")
pytest.importorskip("open_clip", reason="pip install pae[clip]")


def texts(name, *more, names=NAMES):
    return clips.tokenizer(name)([*(f"a photo of a {n}." for n in names), *more])


# ---- the view


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_features_are_the_models_own(name, dtype):
    model = clip(name, dtype)
    ids = texts(name, "one two three four five six seven eight nine ten eleven twelve " * 2)
    view = read_text(model)
    assert view.unproved is None
    with torch.no_grad():
        expected = clips.own_text_features(model, ids)
        assert error(view.features(ids), expected) < (1e-12 if dtype == torch.float64 else 1e-6)
    assert view.shape.feature_width == expected.shape[1]
    assert view.causal == (name in CAUSAL)


@pytest.mark.parametrize("name", CLIPS)
def test_logits_are_the_models_own(name):
    """Without a prompt anywhere: zero-shot."""
    x, model = images(), clip(name)
    with torch.no_grad():
        expected = clips.own_logits(model, x, texts(name))
        made = pae.prompted_clip(
            model, class_names=NAMES, template="a photo of a {}.", tokenizer=clips.tokenizer(name)
        )
        assert error(made(x), expected) < 1e-12
    assert made.class_names == NAMES and made.num_classes == 4


@pytest.mark.parametrize("name", CLIPS)
def test_context_of_words_is_these_words(name):
    """Rows that are those of words give the features of the text with the words."""
    model, words = clip(name), clips.tokenizer(name)
    context = Context(3)
    made = prompted(name, text=context, template="a {}.")
    ids = words(["one small dog"])
    at = made.text.view.starts
    with torch.no_grad():
        context.vectors.copy_(made.text.view.tokens(ids[:, at : at + 3])[0])
        expected = clips.own_text_features(model, words([f"one small dog a {n}." for n in NAMES]))
    assert error(made.text_features(), torch.nn.functional.normalize(expected, dim=1)) < 1e-12


@pytest.mark.parametrize("name", CAUSAL)
def test_rows_around_the_class_name(name):
    model, words = clip(name), clips.tokenizer(name)
    context = Context(3, "middle")
    made = prompted(name, text=context)
    with torch.no_grad():
        context.vectors.copy_(made.text.view.tokens(words(["one small dog"])[:, 1:4])[0])
        expected = clips.own_text_features(model, words([f"one {n} small dog." for n in NAMES]))
    assert error(made.text_features(), torch.nn.functional.normalize(expected, dim=1)) < 1e-12


def test_rows_of_each_class():
    context = Context(4, classes=len(NAMES))
    made = prompted(text=context)
    with torch.no_grad():
        found = made.text_features()
        for i in range(len(NAMES)):
            one = prompted(text=Context(4), names=NAMES[i : i + 1])
            one.text.context.vectors.copy_(context.vectors[i])
            assert error(one.text_features()[0], found[i]) < 1e-12


def test_tower_stays_frozen_and_in_eval_mode():
    made = prompted("transformers")
    trained = {n for n, p in made.named_parameters() if p.requires_grad}
    assert trained == {"vision.prompts.tokens", "text.context.vectors"}
    assert made.training and not made.text.backbone.training and not made.vision.backbone.training
    assert not made.logit_scale.requires_grad


def test_parameters_are_the_models_own():
    """No weight is copied; a move of the model moves them."""
    model = clip("open_clip")
    own = {p.data_ptr() for p in model.parameters()}
    made = pae.prompted_clip(model, None, Context(), NAMES, tokenizer=clips.Words())
    frozen = {p.data_ptr() for p in made.parameters() if not p.requires_grad}
    assert frozen <= own
    made.float()
    assert made.text.view.positions.dtype == torch.float32 == model.positional_embedding.dtype


# ---- the fast engine

SHAPES = {
    "rows in front": {},
    "around the name": {"text": Context(4, "middle")},
    "one row around": {"text": Context(1, "middle")},
    "rows of each class": {"text": Context(4, classes=len(NAMES))},
    "of each class, around": {"text": Context(3, "middle", classes=len(NAMES))},
    "no rows": {"text": Context(0)},
    "a common word behind": {"template": "very {} indeed"},
    "the first word is common": {"text": Context(3, "middle"), "names": ["red cat", "red oak"]},
    "one class": {"names": ["tree frog"]},
    "deep images": {"image": VPTDeep(3)},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_engines_agree(shape, dtype):
    made = prompted(dtype=dtype, **copy.deepcopy(SHAPES[shape]))
    assert_engines_agree(made, images().to(dtype))


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("memory", ["keep", "recompute"])
def test_engines_agree_on_every_tower(name, memory):
    assert_engines_agree(prompted(name), images(), memory=memory)


GROUPED = ["rows in front", "around the name", "rows of each class", "no rows"]


@pytest.mark.parametrize("shape", GROUPED)
def test_engines_agree_where_lengths_run_apart(shape, monkeypatch):
    monkeypatch.setitem(text._GROUP, "cpu", 0)
    made = prompted(**copy.deepcopy(SHAPES[shape]))
    assert len(made.text._groups()[0]) == 3
    assert_engines_agree(made, images())


def test_groups_are_the_cheapest():
    """Against all ways to cut the sorted lengths."""
    generator = torch.Generator().manual_seed(0)
    for count in range(1, 9):
        lengths = torch.randint(2, 60, (count,), generator=generator).tolist()
        groups = text.groups_of(lengths, "cpu")
        assert sorted(i for group in groups for i in group) == list(range(count))

        def cost(parts):
            return sum(32 + len(part) * max(part) for part in parts)

        ordered = sorted(lengths)
        least = min(
            cost([ordered[a:b] for a, b in pairwise([0, *cuts, count])])
            for size in range(count)
            for cuts in combinations(range(1, count), size)
        )
        assert cost([[lengths[i] for i in group] for group in groups]) == least
    assert len(text.groups_of([5, 50] * 20, "cuda")) == 1


def test_what_runs_once():
    """Rows of the layout: start row, shared rows, and where each text ends."""
    layout = prompted().text._layout
    assert (layout.constant, layout.shared, layout.learned) == (1, 5, 4)
    assert layout.lengths == (8, 9, 11, 8)
    layout = prompted(text=Context(4, "middle")).text._layout
    assert (layout.constant, layout.shared, layout.learned) == (1, 3, 2)
    layout = prompted(names=["tree frog"]).text._layout
    assert (layout.constant, layout.shared, layout.lengths) == (1, 8, (9,))
    layout = prompted(text=Context(0)).text._layout
    assert (layout.constant, layout.shared) == (5, 5)
    layout = prompted("open_clip, SigLIP").text._layout
    assert (layout.constant, layout.shared, layout.lengths) == (0, 0, (20,) * 4)


def test_one_block():
    assert_engines_agree(prompted("open_clip, one block"), images())


# ---- what is refused


def build(name="open_clip", **options):
    options = {"class_names": NAMES, "tokenizer": clips.tokenizer(name), **options}
    return pae.prompted_clip(clip(name), **options)


REFUSED = [
    ({"class_names": []}, "class_names must be a list of at least one name, got []"),
    ({"class_names": "cat"}, "class_names must be a list of at least one name, got 'cat'"),
    ({"class_names": ["cat", " "]}, "class_names[1] must be a name that is not empty, got ' '"),
    ({"template": "a photo"}, "template must be a text with one {} for the class name"),
    (
        {"class_names": ["cat", "dog " * 14], "text_prompts": Context(4)},
        "with template '{}.' and 4 context rows has no room in the 20 rows of the text tower",
    ),
    ({"class_names": ["cat", "dog " * 16]}, "has no room in the 20 rows of the text tower"),
    (
        {"text_prompts": Context(2, "middle"), "template": "a {}"},
        "template must begin with {} where the context's position is 'middle', got 'a {}'",
    ),
    ({"text_prompts": Context(2, "front")}, "context.position must be one of ('end', 'middle')"),
    (
        {"tokenizer": lambda texts: torch.ones(len(texts), 3, dtype=torch.int64)},
        "tokenizer must pad its texts to the 20 rows of the text tower, got 3",
    ),
    ({"tokenizer": None}, "tokenizer must be given, the one that the text tower was trained with"),
    ({"tokenizer": lambda texts: [[1]]}, "tokenizer must give int64 (4, 20) of 4 texts, got list"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_refused(options, message):
    refused(ValueError, message, partial(build, **options))


def test_towers_that_are_not_read():
    message = "ViTModel has no text tower that can be read: expected CLIP, CustomTextCLIP or"
    from tests.libraries import model

    refused(pae.UnsupportedBackbone, message, partial(read_text, model("ViT")))
    refused(
        pae.UnsupportedBackbone, "Linear has no text", partial(read_text, torch.nn.Linear(2, 2))
    )
    text = clip("open_clip, text tower").text
    text.cls_emb = torch.nn.Parameter(torch.zeros(24))
    refused(pae.UnsupportedBackbone, "TextTransformer.cls_emb is set", partial(read_text, text))
    text.cls_emb, text.pool_type = None, "first"
    refused(pae.UnsupportedBackbone, "pools its text by 'first'", partial(read_text, text))
    text.pool_type, text.attn_mask = "argmax", None
    refused(pae.UnsupportedBackbone, "has no causal mask and reads", partial(read_text, text))


def test_a_tower_that_does_more():
    model = clip("open_clip")
    model.encode_text = lambda ids: 2 * type(model).encode_text(model, ids)
    message = "text tower of CLIP is more than embedding, blocks, norm and projection"
    refused(pae.UnsupportedBackbone, message, partial(read_text, model))
