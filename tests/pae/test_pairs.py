"""Pairs of prompts for two towers: CoOp, DAPT, UPT and its deep variant, APT-VL.

Golden vectors of the released code, by the tiny CLIP that their files hold, through both engines;
and what each promises on CLIPs of every library.
"""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import pae
from pae import text as walk
from pae.backbones.clip_text import read_text
from pae.prompts import (
    DAPT,
    UPT,
    ApproximatedContext,
    ApproximatedPair,
    Approximation,
    CoOp,
    TextContext,
    UPTDeep,
    VPTDeep,
)
from pae.prompts.dapt import frozen_features
from tests import clips
from tests.clips import NAMES
from tests.errors import error
from tests.libraries import images
from tests.tiny import assert_engines_agree, refused

pytest.importorskip("transformers", reason="pip install pae[hf]")
open_clip = pytest.importorskip("open_clip", reason="pip install pae[clip]")

ENGINES = ("reference", "fast")
PRECISIONS = {"f32": (torch.float32, 1e-5, 1e-4), "f64": (torch.float64, 1e-9, 1e-6)}


# ---- the files' own CLIP


def towers(arrays, dtype):
    """Vision tower of timm and text tower of open_clip with the weights of a file; its tokens."""
    from open_clip.transformer import TextTransformer

    vision = VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=3,
        num_heads=2,
        num_classes=16,
        pre_norm=True,
        norm_layer=nn.LayerNorm,
        act_layer="quick_gelu",
    )
    own = {k.removeprefix("timm/"): v for k, v in arrays.items() if k.startswith("timm/")}
    vision.head = nn.Linear(32, 16, bias=False)
    vision.load_state_dict(own)
    for part in vision.modules():
        if isinstance(part, nn.LayerNorm):
            part.eps = 1e-5
    classes, rows = 4, 77
    # every place of every text is a token of its own: the file has embeddings, no table
    suffix, prefix = arrays["token_suffix"], arrays["token_prefix"]
    count = rows - 1 - suffix.shape[1]
    holes = torch.zeros(classes, count, 24)
    table = torch.cat([prefix, holes, suffix], dim=1)
    text = TextTransformer(
        context_length=rows,
        vocab_size=classes * rows + 1,
        width=24,
        heads=3,
        layers=3,
        output_dim=16,
        act_layer=open_clip.transformer.QuickGELU,
    )
    state = {"positional_embedding": arrays["text/pos_embed"]}
    state["text_projection"] = arrays["text/projection"]
    state["token_embedding.weight"] = torch.cat([table.flatten(0, 1), torch.zeros(1, 24)])
    names = {"norm1": "ln_1", "norm2": "ln_2", "attn.qkv.": "attn.in_proj_"}
    names |= {"attn.proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for key, value in arrays.items():
        if not key.startswith("text/") or key in ("text/pos_embed", "text/projection"):
            continue
        key = key.removeprefix("text/")
        key = (
            key.replace("blocks.", "transformer.resblocks.")
            if "blocks" in key
            else f"ln_final{key[4:]}"
        )
        for old, new in names.items():
            key = key.replace(old, new)
        state[key] = value
    missing, extra = text.load_state_dict(state, strict=False)
    assert not extra and set(missing) <= {"attn_mask"}, (missing, extra)
    tokens = torch.arange(classes * rows).view(classes, rows)
    # the tower reads the row of its highest id
    tokens[torch.arange(classes), arrays["eot"]] = classes * rows
    return vision.to(dtype), text.to(dtype), tokens


def model_of(golden, name, precision, pair):
    dtype = PRECISIONS[precision][0]
    arrays = {k: torch.as_tensor(v) for k, v in golden(name).items() if k != "meta_json"}
    vision, text, tokens = towers(arrays, dtype)
    with torch.no_grad():  # the end token's row is each text's own in the file: all are the same
        ends = arrays["token_suffix"][torch.arange(4), arrays["eot"] - 77]
        assert error(ends, ends[:1].expand_as(ends)) == 0
        text.token_embedding.weight[-1] = ends[0].to(dtype)
    words = pae.PromptedText(read_text(text), pair.text, tokens)
    seen = pae.PromptedViT(vision, pair.image)
    made = pae.PromptedCLIP(seen, words, arrays["logit_scale"].to(dtype), pair=pair)
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in arrays.items()}
    return made.train(), cast


def near(got, expected, tolerance):
    return (got.detach().double() - expected.double()).abs().max() < tolerance


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_dapt_golden(golden, precision, engine):
    _, value, gradient = PRECISIONS[precision]
    raw = {k: torch.as_tensor(v) for k, v in golden("dapt").items() if k != "meta_json"}
    meta = json.loads(str(golden("dapt")["meta_json"]))
    pair = DAPT(4, 5, meta["vis_beta"], meta["txt_beta"])
    made, arrays = model_of(golden, "dapt", precision, pair)
    with torch.no_grad():
        pair.text.tokens.copy_(arrays["txt_ctx"])
        pair.image.tokens.copy_(arrays["vis_ctx"])
    shots = arrays["shots/images"], arrays["shots/labels"]
    found = pair.find_prototypes(
        made, [(s[:5], y[:5]) for s, y in [shots]] + [tuple(t[5:] for t in shots)]
    )
    at = f"{precision}/"
    assert near(found, raw[at + "prototypes"], value)
    x, y = arrays["images"], arrays["labels"]
    f, g = made.features(x, engine), made.text_features(engine)
    logits = made.logits(f, g)
    ce, (image, text) = F.cross_entropy(logits, y), pair.losses(f, g, y)
    values = {"image_features": f, "text_features": g, "ce": ce, "vis_loss": image}
    for key, got in {**values, "txt_loss": text}.items():
        assert near(got, raw[at + key], value), key
    assert error(logits, raw[at + "logits"]) < value
    tokens = {"txt_ctx": pair.text.tokens, "vis_ctx": pair.image.tokens}
    for end, part in {"_of_ce": ce, "_of_vis": image, "_of_txt": text}.items():
        grads = torch.autograd.grad(
            part, list(tokens.values()), retain_graph=True, allow_unused=True
        )
        for (key, own), grad in zip(tokens.items(), grads):
            wanted = raw[f"{at}grad_{key}{end}"]
            grad = torch.zeros_like(own) if grad is None else grad
            assert error(grad, wanted) < gradient if wanted.any() else not grad.any(), (key, end)
    loss = made.loss(x, y, engine)
    assert near(loss, raw[at + "loss"], value * max(1.0, float(loss.detach())))
    loss.backward()
    for key, own in tokens.items():
        assert error(own.grad, raw[f"{at}grad_{key}"]) < gradient, key


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variant", ["released", "mixing"])
def test_upt_golden(golden, variant, precision, engine):
    _, value, gradient = PRECISIONS[precision]
    raw = {k: torch.as_tensor(v) for k, v in golden("upt").items() if k != "meta_json"}
    pair = UPT(4, dropout=0.0, faithful=variant == "released")
    made, arrays = model_of(golden, "upt", precision, pair)
    own = {"uni_ctx": pair.uni_ctx, **{f"mlp.{n}": p for n, p in pair.mlp.named_parameters()}}
    own |= dict(pair.mixer.named_parameters())
    with torch.no_grad():
        for key, p in own.items():
            p.copy_(arrays[f"generator/{key}"])
    at = f"{variant}/{precision}/"
    assert near(pair.text_rows(), raw[at + "text_context"], value)
    assert near(pair.image_rows(), raw[at + "visual_prompts"], value)
    x, y = arrays["images"], arrays["labels"]
    logits = made(x, engine=engine)
    assert error(logits, raw[at + "logits"]) < value
    loss = made.loss(x, y, engine)
    assert near(loss, raw[at + "loss"], value)
    loss.backward()
    for key, p in own.items():
        wanted = raw[f"{at}grad_{key}"]
        # a key's bias moves all logits of a query alike: rounding is left of it
        got = p.grad
        if key == "self_attn.in_proj_bias":
            got, wanted = (t.clone() for t in (got, wanted))
            got[24:48], wanted[24:48] = 0, 0
        assert error(got, wanted) < gradient, key


# ---- CLIPs of every library

PAIRS = {
    "coop": lambda: CoOp(3),
    "coop middle": lambda: CoOp(3, "middle"),
    "coop own": lambda: CoOp(2, "end", len(NAMES)),
    "dapt": lambda: DAPT(3, 4),
    "upt": lambda: UPT(2, dropout=0.3),
    "upt released": lambda: UPT(2, dropout=0.3, faithful=True),
    "upt-deep": lambda: UPTDeep(2, 8, dropout=0.3),
    "apt-vl": lambda: ApproximatedPair(4, 2),
    "apt-vl beside rows": lambda: ApproximatedPair(4, 2, 3, 3, dropout=0.3),
}


def build(name, library="open_clip", dtype=torch.float64):
    torch.manual_seed(0)
    pair = PAIRS[name]()
    made = clips.prompted(library, pair=pair, dtype=dtype)
    with torch.no_grad():
        for p in (q for q in made.parameters() if q.requires_grad):
            p.add_(0.3 * torch.randn(p.shape, dtype=dtype))
    if isinstance(pair, DAPT):
        pair.find_prototypes(made, [(images(8).to(dtype), torch.arange(8) % 4)])
    return made


def step(made, x, y, engine):
    torch.manual_seed(5)
    made.zero_grad()
    loss = made.loss(x, y, engine)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in made.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("library", ["open_clip", "transformers"])
def test_engines_agree(name, library):
    made, y = build(name, library), torch.tensor([0, 3, 1])
    x = images()
    expected, wanted = step(made, x, y, "reference")
    got, grads = step(made, x, y, "fast")
    assert error(got, expected) < 1e-9
    largest = max(g.norm() for g in wanted.values() if g is not None)
    assert wanted and largest > 1e-3
    for key, grad in wanted.items():
        assert (grad is None) == (grads[key] is None), key
        if grad is not None:
            assert (grads[key] - grad).norm() < 1e-7 * grad.norm() + 1e-12 * largest, key
    made.eval()
    with torch.no_grad():
        assert error(made(x, engine="fast"), made(x)) < 1e-9


@pytest.mark.parametrize("name", PAIRS)
def test_trained_and_copied(name):
    made = build(name)
    state = made.trained_state()
    named = {n for n, p in made.named_parameters() if p.requires_grad}
    assert named <= set(state) and not any("prototypes" in n for n in state)
    groups = made.parameter_groups(1.0, 0.0)
    counted = [id(p) for g in groups for p in g["params"]]
    assert len(counted) == len(set(counted)) == len(named)
    twin, x = copy.deepcopy(made).eval(), images()
    made.eval()
    before = made(x, engine="fast")
    with torch.no_grad():
        for p in (q for q in twin.parameters() if q.requires_grad):
            p.mul_(0.5)
        assert torch.equal(made(x, engine="fast"), before)
        assert error(twin(x, engine="fast"), before) > 1e-3
    json.dumps(made.pair.config())
    again = type(made.pair)(**made.pair.config())
    assert again.config() == made.pair.config()


@pytest.mark.parametrize("name", PAIRS)
def test_file_comes_back(name, tmp_path):
    made, x = build(name).eval(), images()
    made.save(tmp_path / "a.safetensors")
    torch.manual_seed(9)
    again = clips.prompted(pair=PAIRS[name]()).eval()
    again.load(tmp_path / "a.safetensors")
    with torch.no_grad():
        assert torch.equal(again(x), made(x))


def test_evaluation_drops_nothing_and_training_does():
    for name in ("upt", "upt-deep"):
        made, x = build(name), images()
        with torch.no_grad():
            assert error(made(x), made(x)) > 1e-3
            made.eval()
            assert torch.equal(made(x), made(x))


def test_halves_of_upt_drop_apart():
    """As released: the layer runs once for the text and once for the image."""
    made = build("upt")
    with torch.no_grad():
        torch.manual_seed(1)
        text, image = made.pair.text_rows(), made.pair.image_rows()
        torch.manual_seed(1)
        assert torch.equal(made.pair.text_rows(), text)
        torch.manual_seed(1)
        assert not torch.equal(made.pair.image_rows(), image)


def test_upt_rows_pass_the_norm_in_front():
    """Inserted by hand into the tower's own stem, ahead of ln_pre."""
    made = build("upt").eval()
    tower, x = made.vision.backbone, images()
    with torch.no_grad():
        rows = tower.conv1(x).flatten(2).transpose(1, 2)
        first = tower.class_embedding.expand(len(x), 1, -1)
        rows = torch.cat([first, rows], dim=1) + tower.positional_embedding
        prompts = made.pair.image_rows().expand(len(x), -1, -1)
        rows = tower.ln_pre(torch.cat([rows[:, :1], prompts, rows[:, 1:]], dim=1))
        for block in tower.transformer.resblocks:
            rows = block(rows)
        expected = F.normalize(tower.ln_post(rows[:, 0]) @ tower.proj, dim=1)
        for engine in ENGINES:
            assert error(made.features(x, engine), expected) < 1e-9


# ---- APT-VL on the text tower

APPROXIMATED = {
    "SigLIP": ("transformers, SigLIP", {}),
    "open SigLIP": ("open_clip, SigLIP", {"text": ApproximatedContext(4, 2, 2)}),
    "one block": ("open_clip, one block", {}),
    "layer scale": ("open_clip, layer scale", {}),
    "around the name": ("open_clip", {"text": ApproximatedContext(4, 2, 3, "middle")}),
    "one class": ("transformers", {"names": ["tree frog"]}),
}


def approximated(name):
    library, options = copy.deepcopy(APPROXIMATED[name])
    made = clips.prompted(library, **{"text": ApproximatedContext(4, 2), **options})
    with torch.no_grad():
        for p in made.text.context.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(6)))
    return made


@pytest.mark.parametrize("name", APPROXIMATED)
def test_engines_agree_on_approximated_texts(name):
    made = approximated(name)
    for memory in ("keep", "recompute"):
        assert_engines_agree(made, images(), memory=memory)


def test_rows_of_each_class_beside_a_bypass():
    class Beside(clips.Context):
        def bind(self, width, depth):
            super().bind(width, depth)
            self.approximation = Approximation(depth, 4, width, 2)

        def attention_bypass(self, index, h, y):
            return self.approximation(index, h, y)

    made = clips.prompted(text=Beside(3, classes=len(NAMES)))
    assert_engines_agree(made, images())
    assert made.text.context.approximation.prompts.requires_grad


def test_approximated_texts_where_lengths_run_apart(monkeypatch):
    monkeypatch.setitem(walk._GROUP, "cpu", 0)
    made = approximated("layer scale")
    assert len(made.text._groups()[0]) == 3
    assert_engines_agree(made, images())


def test_approximated_texts_by_hand():
    """Around the model's own modules, with their own causal mask."""
    made = approximated("one class")
    own, text = made.text.context.approximation, made.text.backbone.text_model
    with torch.no_grad():
        x = made.text.embed()
        mask = torch.full((x.shape[1],) * 2, -torch.inf, dtype=x.dtype).triu(1)
        for i, layer in enumerate(text.encoder.layers):
            h = layer.layer_norm1(x)
            q, k, v = (
                getattr(layer.self_attn, n)(h).unflatten(-1, (3, -1)).transpose(1, 2)
                for n in ("q_proj", "k_proj", "v_proj")
            )
            out = (q @ k.mT / 8**0.5 + mask).softmax(-1) @ v
            y = layer.self_attn.out_proj(out.transpose(1, 2).flatten(2))
            p, a, b = own.prompts[i], own.down[i], own.up[i]
            act = (h @ (p + (p @ a.T) @ b.T).T).relu()
            x = x + own.scale[i].exp() * (y + act.amax(-1, keepdim=True) * (act @ p))
            x = x + layer.mlp(layer.layer_norm2(x))
        found = made.text.view.readout(x[:, made.text.ends[0]])
    for engine in ENGINES:
        assert error(made.text_features(engine), F.normalize(found, dim=1)) < 1e-9


def test_what_approximated_texts_do_not_run(monkeypatch):
    """Rows of each call: what all classes share once, in the last block one row per class."""
    made, seen, own = approximated("layer scale"), [], Approximation.forward

    def counted(self, index, h, y, mask=None):
        seen.append(tuple(h.shape[:2]))
        return own(self, index, h, y, mask)

    monkeypatch.setattr(Approximation, "forward", counted)
    made.text_features("fast")
    assert seen == [(4, 6), (1, 5)] * 2 + [(4, 1)]
    seen.clear()
    made.text_features("reference")
    assert seen == [(4, 20)] * 3


def test_dropout_of_approximated_texts():
    made = build("apt-vl beside rows")
    with torch.no_grad():
        assert error(made.text_features(), made.text_features()) > 1e-3
        made.eval()
        assert torch.equal(made.text_features(), made.text_features())


def test_a_bypass_of_another_shape_and_a_hook():
    made = approximated("one block")
    made.text.backbone.transformer.resblocks[0].mlp.register_forward_hook(lambda *_: None)
    for engine in ENGINES:
        with pytest.raises(pae.UnsupportedBackbone, match="forward hook"):
            made(images(), engine=engine)

    class Short(clips.Context):
        def attention_bypass(self, index, h, y):
            return y[:, :1]

    made = clips.prompted(text=Short())
    for engine in ENGINES:
        message = "Short.attention_bypass(0) must give rows like y, (4, "
        refused(ValueError, message, lambda e=engine: made(images(), engine=e))


def test_dapt_without_its_losses_is_refused():
    """In a loop of one's own they would be left out."""
    made, x = build("dapt").train(), images(2)
    F.cross_entropy(made(x), torch.tensor([0, 1]))
    message = "DAPT's losses read both towers' features and the labels: use model.loss(images"
    refused(RuntimeError, message, made.penalty)
    assert made.eval().penalty() == 0


def test_dapt_terms_by_hand():
    pair = DAPT(2, 2, 0.5, 0.25)
    pair.prototypes = torch.randn(3, 5, dtype=torch.float64)
    f, g = (F.normalize(torch.randn(n, 5, dtype=torch.float64), dim=1) for n in (4, 3))
    y = torch.tensor([0, 2, 2, 1])
    image = sum(((f[i] - pair.prototypes[y[i]]) ** 2).sum() for i in range(4)) / 20
    pairs = [(0, 1), (0, 2), (1, 2)]
    text = sum(torch.exp(-2 * ((g[i] - g[j]) ** 2).sum()) for i, j in pairs) / 3
    pair.see_features(f, g, y)
    assert error(pair.penalty(), 0.5 * image + 0.25 * text) < 1e-12
    refused(RuntimeError, "ahead of each penalty()", pair.penalty)  # it was of one forward
    alone = pair.losses(f, g[:1], torch.zeros_like(y))[1]
    assert alone == 0


def test_prototypes_are_of_the_frozen_tower():
    made, x = build("dapt"), images(8)
    y = torch.arange(8) % 4
    with torch.no_grad():
        bare = clips.prompted(image=VPTDeep(0), text=TextContext(2))
        assert error(frozen_features(made.vision, x), bare.features(x)) < 1e-9
        expected = torch.stack([bare.features(x)[y == c].mean(0) for c in range(4)])
    assert error(made.pair.find_prototypes(made, [(x[:3], y[:3]), (x[3:], y[3:])]), expected) < 1e-9
    assert (made.pair.prototypes.norm(dim=1) < 0.999).all()


# ---- starts


def test_starts():
    torch.manual_seed(0)
    context = TextContext(400)
    context.bind(64, 3)
    assert context.tokens.shape == (400, 64) and abs(context.tokens.std() / 0.02 - 1) < 0.02
    own = TextContext(4, num_classes=7)
    own.bind(8, 3)
    assert own.rows().shape == (7, 4, 8)
    made = clips.prompted(pair=UPT())
    pair = made.pair
    assert pair.uni_ctx.shape == (8, 24) and pair.mlp.weight.shape == (32, 24)
    deep = clips.prompted(pair=UPTDeep()).pair
    assert deep.image_tokens.shape == (3, 4, 32) and deep.mixer.linear1.weight.shape == (128, 128)


# ---- what is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TextContext(-1), "num_tokens must be at least 0"),
        (lambda: TextContext(4, "front"), "position must be one of"),
        (lambda: DAPT(image_weight=-1.0), "image_weight must be a number of at least 0, got -1.0"),
        (lambda: DAPT(text_weight=float("inf")), "text_weight must be a number of at least 0"),
        (lambda: UPT(0), "num_tokens must be at least 1, got 0"),
        (lambda: UPT(dropout=1.0), "dropout must be"),
        (lambda: UPTDeep(hidden=0), "hidden must be at least 1, got 0"),
        (lambda: ApproximatedContext(0), "num_prompts must be at least 1, got 0"),
        (lambda: ApproximatedPair(4, 0), "rank must be at least 1, got 0"),
        (lambda: ApproximatedPair(context_tokens=-1), "context_tokens must be at least 0"),
        (lambda: pae.prompts.register_pair("Up"), "method must be lower-case"),
        (lambda: pae.prompts.register_pair("dapt")(UPT), "method 'dapt' of .*UPT is taken"),
        (lambda: pae.prompts.register_pair("vpt-deep")(UPT), "method 'vpt-deep' of .* is taken"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_pair_belongs_to_one_model():
    for name in PAIRS:
        made = build(name)
        with pytest.raises(RuntimeError, match="already belongs to a model"):
            clips.prompted(pair=made.pair)


def test_towers_in_another_order():
    pair = UPT()
    with pytest.raises(RuntimeError, match=r"build its pae\.PromptedText before its pae\.Prom"):
        pae.PromptedViT(
            VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2),
            pair.image,
        )


def test_no_prototypes():
    made = clips.prompted(pair=DAPT(2, 2))
    with pytest.raises(RuntimeError, match="DAPT has no prototypes yet"):
        made.loss(images(), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(
        ValueError, match="an image of every class for DAPT's prototypes, none of 2"
    ):
        made.pair.find_prototypes(made, [(images(), torch.tensor([0, 1, 3]))])


def test_a_norm_in_front_needs_rows_that_enter():
    with pytest.raises(TypeError, match="enters_before_norm is True and enters_sequence is False"):
        type("Lost", (VPTDeep,), {"enters_before_norm": True})
