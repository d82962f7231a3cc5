"""Two towers: the text tower's view against the models themselves, textbook and fast engine."""

import copy
import pickle
from functools import partial
from itertools import combinations, pairwise

import pytest
import torch

import pae
from pae import text
from pae.backbones.clip_text import read_text
from pae.prompts import METHODS, VPTDeep
from tests import clips
from tests.clips import CAUSAL, CLIPS, NAMES, Context, clip, prompted
from tests.errors import error
from tests.libraries import images
from tests.tiny import assert_engines_agree, gradients, refused, small

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


def test_a_start_token_that_only_the_tokenizer_knows_of():
    """SigLIP's tower does not say whether its texts begin with one."""
    for words, starts in ((clips.WordsOfSiglip(), 0), (clips.Words(), 1)):
        made = prompted("open_clip, SigLIP", tokenizer=words)
        assert made.text.live[0].tolist() == list(range(starts, starts + 4))
        same = words(["cat.", "oak."])[:, 0]
        assert (same[0] == same[1]) == bool(starts)


def test_no_rows_around_the_class_name():
    """Then nothing stands anywhere, and any template will do."""
    made, plain = (prompted(text=context) for context in (Context(0, "middle"), Context(0)))
    with torch.no_grad():
        assert torch.equal(made.text_features(), plain.text_features())


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
def test_engines_agree(shape):
    assert_engines_agree(prompted(**copy.deepcopy(SHAPES[shape])), images())


@pytest.mark.parametrize("name", ["open_clip", "transformers, SigLIP"])
def test_engines_agree_in_fp32(name):
    assert_engines_agree(prompted(name, dtype=torch.float32), images().float())


@pytest.mark.parametrize("name", CLIPS)
def test_engines_agree_on_every_tower(name):
    assert_engines_agree(prompted(name), images())


def test_engines_agree_where_less_is_kept():
    assert_engines_agree(prompted(), images(), memory="recompute")


GROUPED = ["rows in front", "around the name", "rows of each class"]


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


@pytest.mark.parametrize("seed", range(2))
def test_autocast(seed):
    """bf16 products: the fast engine is as near to the truth as the blocks themselves."""
    made = prompted("transformers", dtype=torch.float32)
    with torch.no_grad():
        made.text.context.vectors.add_(0.1 * seed)
    wide = copy.deepcopy(made).double()
    truth, exact = gradients(wide, images(), "reference")

    def off(engine):
        with torch.autocast("cpu", torch.bfloat16):
            logits, grads = gradients(made, images().float(), engine)
        assert logits.dtype == torch.float32
        return error(logits, truth), error(
            grads["text.context.vectors"], exact["text.context.vectors"]
        )

    theirs, ours = off("reference"), off("fast")
    assert min(theirs + ours) > 1e-4  # it did run in 16 bits
    assert all(a < 2 * b for a, b in zip(ours, theirs)), (ours, theirs)


def test_a_tower_that_was_changed_is_folded_again_or_refused():
    made, x = prompted(), images()
    before = made(x, engine="fast")
    block = made.text.view.blocks[1]
    with torch.no_grad():
        block.mlp.c_fc.weight.mul_(1.1)
        made.text.view.table.weight.mul_(1.1)
        made.text.view.positions.add_(0.1)
    assert_engines_agree(made, x)
    assert error(made(x, engine="fast"), before) > 1e-3
    block.ln_1.register_forward_hook(lambda *_: None)
    message = "blocks.1.ln_1 has a forward hook: the fast engine would not run it"
    refused(pae.UnsupportedBackbone, message, partial(made, x, engine="fast"))


def test_copies_stand_alone():
    made, x = prompted().eval(), images()
    expected = pae.fast_forward(made, x)
    twin = pickle.loads(pickle.dumps(made))
    for other in (copy.deepcopy(made), twin):
        assert torch.equal(pae.fast_forward(other, x), expected)
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(1.1)
        assert error(pae.fast_forward(other, x), other(x)) < 1e-12
        assert error(other(x), expected) > 1e-3
    assert torch.equal(pae.fast_forward(made, x), expected)


# ---- features that are kept


def count_texts(made, monkeypatch):
    """How often text features are computed, one entry each time."""
    seen, own = [], type(made.text)._features

    def counted(self, *given):
        seen.append(given)
        return own(self, *given)

    monkeypatch.setattr(type(made.text), "_features", counted)
    return seen


CHANGES = {
    "context": lambda m: m.text.context.vectors.mul_(1.1),
    "context replaced": lambda m: setattr(
        m.text.context, "vectors", torch.nn.Parameter(1.1 * m.text.context.vectors)
    ),
    "an attribute": lambda m: setattr(m.text.context, "scale", 2.0),
    "a block": lambda m: m.text.view.blocks[0].ln_1.weight.mul_(1.1),
    "positions": lambda m: m.text.view.positions.mul_(1.1),
    "readout": lambda m: m.text.view.readers[1][0].mul_(2),
}


@pytest.mark.parametrize("engine", ["reference", "fast"])
@pytest.mark.parametrize("change", CHANGES)
def test_features_are_never_stale(engine, change, monkeypatch):
    class Scaled(Context):
        scale = 1.0

        def rows(self):
            return self.scale * super().rows()

    made = prompted(text=Scaled(), names=["big cat", "tree"]).eval()
    seen = count_texts(made, monkeypatch)
    with torch.no_grad():
        first = made.text_features(engine)
        assert made.text_features(engine) is first and len(seen) == 1
        kept = first.clone()
        first.zero_()  # nobody's business, but it is seen
        first = made.text_features(engine)
        assert torch.equal(first, kept) and len(seen) == 2
        CHANGES[change](made)
        fresh = made.text_features(engine)
        assert len(seen) == 3 and error(fresh, first) > 1e-4
        assert error(fresh, made.text._features(engine, "keep")) == 0


def test_when_features_are_computed(monkeypatch):
    made, x = prompted(), images()
    seen = count_texts(made, monkeypatch)
    made(x), made(x)
    assert len(seen) == 2  # once a step
    made.eval()
    assert made(x).requires_grad and len(seen) == 3  # somebody asks for gradients
    with torch.inference_mode():
        made(x), made(x), made(x, engine="fast"), made(x, engine="fast")
    assert len(seen) == 5
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        made(x)
    assert len(seen) == 6
    with torch.no_grad():
        made(x)  # that were made under inference mode
        made.text.backbone.ln_final.register_forward_hook(lambda *_: None)
        made(x), made(x)  # a hook wants to see every forward
    made.text.train()
    with torch.no_grad():
        made(x)


def test_texts_without_learned_rows_are_features_once(monkeypatch):
    """In training too, and they serve a step after an evaluation under inference mode."""
    x = images()
    made = pae.prompted_clip(clip("open_clip"), VPTDeep(3), None, NAMES, tokenizer=clips.Words())
    seen = count_texts(made, monkeypatch)
    with torch.inference_mode():
        made(x, engine="fast")
    for _ in range(2):
        made.train().loss(x, torch.tensor([0, 1, 2]), engine="fast").backward()
    assert len(seen) == 1 and made.vision.prompts.tokens.grad.abs().sum() > 0
    assert_engines_agree(made, x)


# ---- loss, pairs, and what goes on in an image tower


class Pair(torch.nn.Module):
    """Both prompts of one generator, and a term that reads the features."""

    def __init__(self):
        super().__init__()
        self.image, self.text = VPTDeep(2), Rows(3)
        self.seed = self.text.seed = torch.nn.Parameter(torch.ones(1))
        self.seen = None

    def see_features(self, found, texts, labels):
        self.seen = found, texts, labels

    def penalty(self):
        found, texts, labels = self.seen
        return (found - texts[labels]).square().mean()


class Rows(Context):
    def rows(self):
        return self.seed * super().rows()


@pytest.mark.parametrize("engine", ["reference", "fast"])
def test_a_pair(engine):
    made, x, labels = prompted(pair=Pair()), images(), torch.tensor([2, 0, 2])
    loss = made.loss(x, labels, engine)
    found, texts = made.features(x), made.text_features()
    for f in (found, texts):
        assert error(f.norm(dim=1), torch.ones(len(f)).double()) < 1e-12
    expected = torch.nn.functional.cross_entropy(20.085536923187668 * found @ texts.T, labels)
    expected = expected + (found - texts[labels]).square().mean()
    assert error(loss, expected) < 1e-12
    loss.backward()
    assert made.pair.seed.grad.abs() > 0
    groups = {g["name"]: g for g in made.parameter_groups(0.1, 5e-4)}
    assert {n: len(g["params"]) for n, g in groups.items()} == {"prompts": 1, "text": 2}
    made.pair.seen = None
    made.eval().loss(x, labels)
    assert made.pair.seen is None  # there is no training


def test_a_pairs_parameter_outside_of_the_context_makes_features_anew():
    made = prompted(pair=Pair()).eval()
    with torch.no_grad():
        first = made.text_features("fast")
        made.pair.seed.mul_(1.5)
        assert error(made.text_features("fast"), first) > 1e-3


@pytest.mark.parametrize("family", list(METHODS.values()), ids=list(METHODS))
def test_every_family_on_the_image_tower(family):
    """In training mode, in value and in every gradient of both towers."""
    made, x = prompted("transformers", image=small(family, num_classes=4)), images()
    made.vision.prompts.see_labels(torch.tensor([0, 3, 1]))
    assert_engines_agree(made, x)
    _, grads = gradients(made, x, "fast")
    assert grads["text.context.vectors"].norm() > 1e-3
    own = [g for n, g in grads.items() if n.startswith("vision.prompts.") and g is not None]
    assert max(g.norm() for g in own) > 1e-3


def test_koopman_lyapunov_on_the_image_tower():
    made = prompted(image=VPTDeep(3), kld=pae.KLD(8))
    x, labels = images(), torch.tensor([2, 0, 1])
    plain = torch.nn.functional.cross_entropy(made(x, engine="fast"), labels)
    loss = made.loss(x, labels, "fast")
    assert error(loss - plain, sum(made.vision.kld.terms(made.vision.prompts.raw_prompts()))) < 1e-9
    loss.backward()
    assert made.vision.kld.K.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["open_clip", "transformers"])
def test_modal_pre_alignment_ranks_by_the_contrast(name):
    made, x = prompted(name, image=VPTDeep(2)), images(4)
    labels, head = torch.tensor([0, 1, 2, 3]), made.vision.head
    found = made.mpa_init(x, labels, window=8, stride=4, progress=False)
    assert made.vision.head is head and made.text.training
    # the loss of a window is that of the images seen through it, zero prompts in place
    window = int(found.selected[0])
    row, column = found.origins[window].tolist()
    mask = torch.zeros(16, 16).double()
    mask[row : row + 8, column : column + 8] = 1
    spectrum = torch.fft.fftshift(torch.fft.fft2(x), dim=(-2, -1)) * mask
    seen = torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1))).real
    aligned = made.vision.prompts.tokens.detach().clone()
    with torch.no_grad():
        made.vision.prompts.tokens.zero_()
        expected = torch.nn.functional.cross_entropy(made(seen), labels)
    assert error(found.losses[window], expected) < 1e-9
    assert aligned.abs().sum() > 0
    refused(ValueError, "labels must lie in [0, 4)", partial(made.mpa_init, x, labels + 1))


# ---- files


def test_files(tmp_path):
    path, x = tmp_path / "a.safetensors", images()
    made = prompted(kld=None, train_backbone="biases").eval()
    with torch.no_grad():
        for p in made.parameters():
            p += 0.01 if p.requires_grad else 0.0
    made.save(path, {"note": "here"}, pae.TaskInfo(classes=NAMES))
    again = prompted(train_backbone="biases").eval().load(path)
    assert torch.equal(again(x), made(x)) and again.task.classes == NAMES
    names = {n for n, p in made.named_parameters() if p.requires_grad}
    assert set(made.trained_state()) == names

    other = prompted(train_backbone="biases", names=["a", "b"]).eval()
    message = "was trained on 4 classes, 'cat', 'tree frog', ..., and the model has 2, 'a', 'b': "
    refused(pae.CheckpointError, message, partial(other.load, path))
    other.load(path, other_classes=True)
    assert torch.equal(other.text.context.vectors, made.text.context.vectors)


def test_files_of_pairs(tmp_path):
    path, x = tmp_path / "a.safetensors", images()
    made = prompted(pair=Pair()).eval()
    with torch.no_grad():
        made.pair.seed.mul_(2)
    made.save(path)
    assert torch.equal(prompted(pair=Pair()).eval().load(path)(x), made(x))


def test_parts_of_files_that_mean_something_else(tmp_path):
    """Their tensors fit."""
    context = pae.prompts.TextContext
    prompted(text=context(4)).save(tmp_path / "a")
    other = prompted(text=context(4, "middle"))
    message = "TextContext's position 'end', and this model has 'middle'"
    refused(pae.CheckpointError, message, partial(other.load, tmp_path / "a"))
    made = prompted(pair=pae.prompts.UPT(4))
    made.save(tmp_path / "b")
    other = prompted(pair=pae.prompts.UPT(4, faithful=True))
    message = "UPT's faithful False, and this model has True"
    refused(pae.CheckpointError, message, partial(other.load, tmp_path / "b"))
    other = prompted(text=context(4))
    for block in other.vision.backbone.transformer.resblocks:
        block.mlp.gelu = torch.nn.GELU()
    message = "on the image tower of these weights with activation quick_gelu, and here it is gelu"
    refused(pae.CheckpointError, message, partial(other.load, tmp_path / "a"))
    other = prompted(text=context(4), template="a {} indeed.")
    message = "was trained with texts '{}.', and the model has 'a {} indeed.'"
    refused(pae.CheckpointError, message, partial(other.load, tmp_path / "a"))


def test_files_that_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    made = prompted()
    made.save(path)
    refused(
        pae.CheckpointError,
        "was trained on the image tower VisionTransformer with fingerprint",
        partial(prompted("open_clip, layer scale").load, path),
    )
    other = prompted()
    with torch.no_grad():
        other.text.view.positions.add_(1)
    message = "was trained on the text tower Tower with positions"
    refused(pae.CheckpointError, message, partial(other.load, path))
    message = "text.context.vectors is (4, 24) in the file, (3, 24) in the model"
    refused(pae.CheckpointError, message, partial(prompted(text=Context(3)).load, path))
    refused(pae.CheckpointError, "has format 'pae-clip-1'", partial(made.vision.load, path))
    made.vision.save(path)
    message = "has format 'pae-2', expected 'pae-clip-1': it is of one tower"
    refused(pae.CheckpointError, message, partial(made.load, path))
    message = "was trained with train_backbone [], and the model has"
    prompted().save(path)
    biased = prompted(train_backbone="biases")
    refused(pae.CheckpointError, "image tower", partial(biased.load, path))
    with torch.no_grad():
        made.text.context.vectors[0, 0] = torch.nan
    refused(ValueError, "text.context.vectors holds NaN", partial(made.save, path))


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


ODD = ['"quoted"', "it's", "snow_leopard", "naïve café", "猫", "a {brace}", "U.S.", "<tag>"]


def test_names_of_every_kind():
    """By open_clip's own tokenizer, whole; what does not fit in 77 rows is refused."""
    from open_clip import model
    from open_clip.tokenizer import SimpleTokenizer

    from tests.tiny import filled

    words, shape = SimpleTokenizer(), {**clips.OPEN_TEXT, "context_length": 77, "vocab_size": 49408}
    tower = filled(model.CLIP(16, clips.OPEN_VISION, shape)).double().eval()
    made = pae.prompted_clip(tower, None, pae.prompts.TextContext(4), ODD)
    assert_engines_agree(made.train(), images())
    ids = words([f"{name}." for name in ODD])
    assert torch.equal(made.text.tokens[:, 5:], ids[:, 1:73]) and made.classes == tuple(ODD)
    message = "class_names[1], 'xxxx"
    both = {"class_names": ["cat", "x" * 300], "text_prompts": pae.prompts.TextContext(4)}
    refused(ValueError, message, partial(pae.prompted_clip, copy.deepcopy(tower), **both))


@pytest.mark.parametrize("names", [["cat", "oak", "cat"], ["Cat", "oak", "cat"]])
def test_two_classes_of_one_text(names):
    class Lower(clips.Words):
        def __call__(self, texts, context_length=clips.ROWS):
            return super().__call__([text.lower() for text in texts], context_length)

    message = rf"class_names\[0\], '{names[0]}', and class_names\[2\], 'cat', are one text"
    with pytest.warns(UserWarning, match=message):
        made = prompted(names=names, tokenizer=Lower())
    logits = made(images())
    assert torch.equal(logits[:, 0], logits[:, 2])


def test_a_name_that_holds_an_end_token():
    words = clips.Words()
    ids = words(["cat.", "oak."])
    ids[1, 1] = clips.END  # as the name's
    message = "tokens[1] ends at row 1, expected a class name behind 1 rows, and an end token at"
    text, end = clip("open_clip, text tower"), partial(pae.PromptedText, context=None, tokens=ids)
    refused(ValueError, message, partial(end, text))


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
