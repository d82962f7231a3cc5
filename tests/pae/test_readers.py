"""Backbones of other libraries: what each hands on without prompts, both engines with them, and
what is refused, by which name.
"""

import copy
from functools import cache, partial

import pytest
import torch

import pae
from pae.prompts import METHODS, VPTDeep, VPTShallow
from tests.errors import assert_not_worse
from tests.libraries import (
    CLIPS,
    MODELS,
    TEXT,
    TOWERS,
    VIDEO,
    WIDE,
    images,
    model,
    own_output,
    version_4,
)
from tests.tiny import assert_engines_agree, error, gradients, over, refused, small

pytest.importorskip("transformers", reason="pip install pae[hf]")
pytest.importorskip("open_clip", reason="pip install pae[clip]")

OTHER = (24, 20)  # another size than that of the models

# one of each reader and readout, where all are too many
FEW = ("ViT", "DINOv2, registers, classes", "CLIP", "SigLIP", "MAE", "BEiT", "VideoMAE, classes")
FEW += ("ViViT", "torchvision", "open_clip", "open_clip, timm's EVA")


def prompted(name, family=None, **more):
    """A model in training mode with prompts as large as its rows, and a head."""
    return over(model(name), family, **more)


@pytest.mark.parametrize("name", MODELS)
def test_without_prompts_it_is_the_model(name):
    backbone, x = model(name), images(name=name)
    with torch.no_grad():
        expected = own_output(backbone, x)
    classifies = pae.backbones.head_name(backbone) is not None
    made = pae.PromptedViT(backbone, VPTDeep(0), num_classes=None if classifies else 5)
    assert made.view.feature_width == made.head.in_features
    with torch.no_grad():
        for engine in ("reference", "fast"):
            got = made(x, engine=engine) if classifies else made.features(x, engine=engine)
            assert error(got, expected) < 1e-12


@pytest.mark.parametrize("name", [n for n in MODELS if not n.startswith(("torch", "open", *CLIPS))])
def test_positions_of_another_size_are_the_models_own(name):
    backbone, x = model(name), images(2, OTHER)
    # what the others do by themselves
    more = {} if name.startswith(("DINO", "BEiT")) else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        expected = own_output(backbone, x, **more)
        view = pae.backbones.read_backbone(backbone)
        rows = view.embed(x)
        assert rows.shape[1] == view.num_rows(OTHER)
        if name != "MAE" and not (version_4() and name == "CLIP, classes"):  # which take no other
            assert error(view.own_output(x), expected) < 1e-12
        placed = view.embed_tokens(view.patch_convolution(OTHER)(x).flatten(2).mT, OTHER)
        assert error(placed, rows) < 1e-14
        classifies = view.head is not None
        made = pae.PromptedViT(backbone, VPTDeep(0), num_classes=None if classifies else 5)
        got = made(x, engine="fast") if classifies else made.features(x, engine="fast")
    assert error(got, expected) < 1e-12


@pytest.mark.parametrize("name", MODELS)
def test_engines_agree(name):
    assert_engines_agree(prompted(name), images(name=name))
    assert_engines_agree(prompted(name, VPTShallow(3)), images(name=name))


# a key's bias has no gradient, which takes long to be sure of
QUERY, VALUE, HIDDEN = ("query", "value", "intermediate.dense")
if not version_4():
    QUERY, VALUE, HIDDEN = ("q_proj", "v_proj", "fc1")
BIASES = {
    "ViT": [f"*{part}.bias" for part in (QUERY, VALUE, "layernorm_before", HIDDEN)],
    "DINOv2": [f"*{VALUE}.bias", "*norm2.weight", "embeddings.cls_token"],
    "BEiT": [f"*{VALUE}.bias", "*layernorm_after.weight"],
    "torchvision": "biases",
    "open_clip": "biases",
}


@pytest.mark.parametrize("name", BIASES)
def test_biases_are_trained_in_both_engines(name):
    """Those of queries and values that are parameters of their own, and packed ones."""
    made = prompted(name, train_backbone=BIASES[name])
    assert len(made.trained_backbone) >= 6
    assert_engines_agree(made, images())
    with torch.no_grad():  # the next step is of the values that are there then
        for p in made.parameters():
            p += 0.1 if p.requires_grad else 0.0
    assert_engines_agree(made, images())


@pytest.mark.parametrize("name", FEW)
def test_weights_stay_where_they_are(name):
    backbone = model(name)
    before = {n: p.data_ptr() for n, p in backbone.named_parameters()}
    own = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
    made = pae.PromptedViT(backbone, VPTDeep(2), num_classes=5)
    pae.fast_forward(made, images(name=name))
    after = {n: p.data_ptr() for n, p in backbone.named_parameters()}
    assert after == {n: before[n] for n in after}
    for i in range(made.view.shape.depth):
        w = made.view.read_block(i)
        for product in (w.qkv, w.proj, w.fc1, w.fc2):
            assert all(p.weight.untyped_storage().data_ptr() in own for p in product.parts)


@pytest.mark.parametrize("name", FEW)
def test_copies_stand_alone(name):
    made, x = prompted(name).eval(), images(name=name)
    expected = pae.fast_forward(made, x)
    twin = copy.deepcopy(made)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.1)
    assert error(pae.fast_forward(twin, x), twin(x)) < 1e-12
    assert error(twin(x), expected) > 1e-3
    assert torch.equal(pae.fast_forward(made, x), expected)


def test_a_hook_on_the_readout_sees_all_rows():
    made, seen = prompted("ViT"), []
    assert made.view.reads_class_only
    made.backbone.layernorm.register_forward_hook(lambda m, a, out: seen.append(out.shape))
    made(images(), engine="fast")
    assert not made.view.reads_class_only and seen == [(3, 17, 32)]


# ---- the table of combinations: a backbone with a family, KLD, MPA, and in a file


def fitting(family, backbone_name):
    """Raises what a family says to a backbone that it cannot have."""
    return prompted(backbone_name, small(family))


@pytest.mark.parametrize("family", METHODS.values(), ids=list(METHODS))
def test_every_family(family):
    assert_engines_agree(fitting(family, "ViT"), images())


@pytest.mark.parametrize("name", [name for name in FEW if name != "ViT"])
def test_keys_in_head_space(name):
    """Which the formula of a block has, and not the block."""
    assert_engines_agree(fitting(METHODS["e2vpt"], name), images(name=name))


def test_a_family_that_needs_a_class_token():
    message = "reads the class token's attention, and the backbone has no class token"
    with pytest.raises(ValueError, match=message):
        fitting(METHODS["ivpt"], "SigLIP")


@pytest.mark.parametrize("name", FEW)
def test_regulariser_initialisation_and_file(name, tmp_path):
    made, x = prompted(name, kld=pae.KLD(8)), images(4, name=name)
    before = made.prompts.tokens.detach().clone()
    align = partial(pae.mpa_init, made, x, torch.arange(4), window=4, stride=4)
    if name.startswith(CLIPS):
        message = (
            "model takes clips of 4 frames, and Modal Pre-Alignment (mpa) filters the spectrum"
        )
        refused(ValueError, message, align)
        pae.spt_init(made, x, method="mean_pooling")
    else:
        assert torch.isfinite(align().losses).all()
    assert not torch.equal(made.prompts.tokens, before)
    loss = made(x, engine="fast").square().mean() + made.penalty()
    loss.backward()
    assert made.kld.K.grad.abs().sum() > 0 and made.prompts.tokens.grad.abs().sum() > 0

    made.eval().save(tmp_path / "a.safetensors")
    again = pae.PromptedViT.from_file(tmp_path / "a.safetensors", model(name)).eval()
    assert torch.equal(again(x), made(x))
    other = model(name)
    with torch.no_grad():
        next(iter(pae.backbones.read_backbone(other).blocks[1].parameters())).add_(0.5)
    state = {n: p.clone() for n, p in other.state_dict().items()}
    with pytest.raises(pae.CheckpointError, match="was trained on backbone"):
        pae.PromptedViT.from_file(tmp_path / "a.safetensors", other)
    assert all(torch.equal(p, state[n]) for n, p in other.state_dict().items())


def test_windows_are_ranked_as_pixels_are(monkeypatch):
    """Patch tokens that are put together rank windows as embedding their pixels does."""
    x, labels = images(2), torch.arange(2)
    quick = pae.mpa_init(prompted("CLIP, classes"), x, labels, window=4, stride=4)
    view = type(prompted("CLIP, classes").view)
    monkeypatch.setattr(view, "patch_convolution", lambda self, size: None)
    slow = pae.mpa_init(prompted("CLIP, classes"), x, labels, window=4, stride=4)
    assert error(quick.losses, slow.losses) < 1e-12


# ---- 16 bits


DRAWS = 16
MEASURED = ("logits", "prompts.tokens", "head.weight")


@cache
def exact(name, seed):
    """(model, images, logits, gradients), in fp64, of weights and images that fp32 holds."""
    made, x = prompted(name), images(2, name=name).float().double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(1 + 0.1 * torch.randn(p.shape, generator=generator))
            p.copy_(p.float())
    return made, x, *gradients(made, x, "reference")


def errors_in_16_bits(name, engine, autocast):
    """(draws, 3): errors against fp64 of logits, prompt gradient and head gradient."""
    errors = torch.zeros(DRAWS, len(MEASURED))
    for seed in range(DRAWS):
        made, x, truth, grads = exact(name, seed)
        made = copy.deepcopy(made).to(torch.float32 if autocast else torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits, own = gradients(made, x.to(made.view.like.dtype), engine)
        each = [error(own[n], grads[n]) for n in MEASURED[1:]]
        errors[seed] = torch.tensor([error(logits, truth), *each])
    return errors


IN_16_BITS = [("DINOv3", True), ("BEiT, classes", True), ("BEiT, classes", False)]
IN_16_BITS += [("VideoMAE, classes", True), ("VideoMAE, classes", False)]


@pytest.mark.parametrize(("name", "autocast"), IN_16_BITS)
def test_16_bits_are_as_good_as_the_reference(name, autocast):
    """Rotary positions, a bias of positions, and a model as most are."""
    theirs = errors_in_16_bits(name, "reference", autocast)
    assert theirs.min() > 1e-4 and theirs.max() < 0.2  # it did run in 16 bits
    ours = errors_in_16_bits(name, "fast", autocast)
    assert_not_worse(ours, theirs, 1.2, MEASURED)


# ---- clips


@pytest.mark.parametrize(
    ("name", "method"),
    [("VideoMAE, classes", m) for m in ("apt", "vfpt", "lspt", "bpt")] + [("ViViT", "ivpt")],
)
def test_gradients_on_clips(name, method):
    """Of those whose prompts are unlike others'; the table of combinations has all families."""
    assert_engines_agree(fitting(METHODS[method], name), images(2, name=name))


@pytest.mark.parametrize("pool", ["all", "prompts"])
def test_prompts_among_the_rows_of_a_mean(pool):
    for name in ("VideoMAE, classes", "VideoMAE", "BEiT, classes"):
        assert_engines_agree(prompted(name, pool=pool), images(2, name=name))
    message = "pool must be 'image' for a backbone whose readout reads"
    for name in ("VideoMAE, first tube", "ViViT", "BEiT, row 0"):
        refused(ValueError, message, lambda name=name: prompted(name, pool=pool))


def test_sizes_of_a_clip():
    """Those of VideoMAE's tubes; prompts are drawn as for one frame's patch."""
    import transformers as T

    with torch.device("meta"):
        narrow = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
        vit = T.VideoMAEModel(T.VideoMAEConfig(**narrow))
        shape = pae.PromptedViT(vit, METHODS["apt"](4), num_classes=2).view.shape
    assert shape.patch_size == (2, 16, 16) and shape.grid == (8, 14, 14)
    assert shape.num_tokens == 1568 and shape.patch_values == 768
    made = prompted("VideoMAE", METHODS["apt"](400))
    assert made.prompts.keys.shape == (3, 400, 8)
    torch.manual_seed(0)
    drawn = METHODS["apt"](400)
    drawn.bind(made.view.shape)
    bound = (6 / (3 * 4 * 4 + 8)) ** 0.5
    assert 0.99 * bound < drawn.keys.abs().max() <= bound


def test_clips_of_another_form_are_named():
    made = prompted("VideoMAE, classes")
    x = images(name="VideoMAE")
    for engine in ("reference", "fast"):
        run = partial(made, engine=engine)
        message = "images must be a float tensor (B, T, C, H, W), got (3, 3, 16, 16) torch.float64"
        refused(ValueError, message, lambda run=run: run(images()))
        message = "images must have 3 channels in clips (B, T, C, H, W), got 4"
        refused(ValueError, message, lambda run=run: run(x.transpose(1, 2)))
        message = "images must be clips of 4 frames, got 2 (take as many, or build the backbone"
        refused(ValueError, message, lambda run=run: run(x[:, :2]))
    message = "images must be a float tensor (B, C, H, W), got (3, 4, 3, 16, 16) torch.float64"
    refused(ValueError, message, lambda: prompted("ViT")(x))


def test_the_norm_behind_a_mean_is_trained_beside_the_prompts():
    """As the published recipe of APT does."""
    made = prompted("VideoMAE, classes", METHODS["apt"](3), train_backbone="fc_norm.*")
    assert made.trained_backbone == ("fc_norm.weight", "fc_norm.bias")
    assert_engines_agree(made, images(2, name="VideoMAE"))


# ---- what is refused


def test_models_one_step_away_name_the_step():
    import open_clip
    import transformers as T

    clip = T.CLIPModel(T.CLIPConfig(**TOWERS))
    message = "CLIPModel of transformers is no model that can be read: give its vision_model"
    refused(pae.UnsupportedBackbone, message, lambda: pae.PromptedViT(clip, VPTDeep(2)))
    pae.PromptedViT(clip.vision_model, VPTDeep(2), num_classes=3)
    mae = T.ViTMAEForPreTraining(T.ViTMAEConfig(**WIDE))
    refused(pae.UnsupportedBackbone, "give its vit", lambda: pae.PromptedViT(mae, VPTDeep(2)))
    for kind, part in (
        (T.VideoMAEForPreTraining(T.VideoMAEConfig(**VIDEO)), "videomae"),
        (T.BeitForMaskedImageModeling(T.BeitConfig(**WIDE, use_mask_token=True)), "beit"),
    ):
        message = f"{type(kind).__name__} of transformers is no model that can be read: give its "
        refuse = partial(pae.PromptedViT, kind, VPTDeep(2))
        refused(pae.UnsupportedBackbone, message + part, refuse)
        pae.PromptedViT(getattr(kind, part), VPTDeep(2), num_classes=3)
    divided = T.TimesformerModel(T.TimesformerConfig(**WIDE, num_frames=2))
    message = "its attention is divided into time and space; use VideoMAE or ViViT"
    refused(pae.UnsupportedBackbone, message, lambda: pae.PromptedViT(divided, VPTDeep(2)))
    bert = T.BertModel(T.BertConfig(**TEXT))
    refused(
        pae.UnsupportedBackbone,
        "BertModel of transformers is no model that can be read: expected one of ViTModel, ",
        lambda: pae.PromptedViT(bert, VPTDeep(2)),
    )
    tower = model("open_clip")
    tower.pool_type = "none"
    message = "VisionTransformer.pool_type is 'none', expected 'tok' or 'avg'"
    refused(pae.UnsupportedBackbone, message, lambda: pae.PromptedViT(tower, VPTDeep(2)))
    text = open_clip.transformer.TextTransformer(4, 9, 32, 4, 2)
    message = "TextTransformer of open_clip is no model that can be read: expected a Vision"
    refused(pae.UnsupportedBackbone, message, lambda: pae.PromptedViT(text, VPTDeep(2)))


def test_a_model_without_a_head_needs_classes():
    message = "num_classes must be given: the backbone has no head"
    for name in ("ViT", "SigLIP", "open_clip"):
        refused(ValueError, message, lambda name=name: pae.PromptedViT(model(name), VPTDeep(2)))


def test_models_of_ones_own_that_derive_from_a_library():
    import transformers as T

    class Mine(T.ViTModel):
        pass

    mine = Mine(T.ViTConfig(**WIDE))
    assert pae.PromptedViT(mine, VPTDeep(2), num_classes=3).view.shape.depth == 3


def test_outputs_captured_by_hooks_are_named():
    """What `output_hidden_states` leaves in the model is a hook on every block."""
    made, x = prompted("ViT"), images()
    made.backbone(x, output_hidden_states=True)
    with pytest.raises(pae.UnsupportedBackbone, match=r"blocks\.0 has a (forward hook|replaced f)"):
        made(x, engine="fast")
    made(x)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("which", ["da-vpt+", "biases"])
def test_biases_and_norms_by_what_they_do(name, which):
    made = prompted(name, train_backbone=which)
    assert_engines_agree(made, images(name=name))
    own = " ".join(made.trained_backbone)
    assert "bias" in own
    if which == "da-vpt+":  # per block: one norm, keys and values, two products, a norm's shift
        assert len(made.trained_backbone) in (3 * 6, 3 * 7, 1 + 3 * 6, 1 + 3 * 7)
        assert ":kv" in own if "in_proj_bias" in own else "query" not in own and "q_proj" not in own
