"""Files of weights as other people's code writes them, made from models that tests draw."""

from __future__ import annotations

import argparse
import itertools
import re

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

_seeds = itertools.count(1)


def vit(**options):
    """A small vision transformer with every tensor random, also those that start at 0 or 1, and
    none as in any other that this makes.
    """
    generator = torch.Generator().manual_seed(next(_seeds))
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    model = VisionTransformer(**{**sizes, "num_classes": 7, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return model


def backbone_of(model):
    return {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("head.")}


def assert_filled(model, expected, loaded=None):
    """Every tensor but the head's is the expected one, bit for bit."""
    state = model.state_dict()
    assert {k for k in state if not k.startswith("head.")} == set(expected)
    for key, tensor in expected.items():
        assert torch.equal(state[key], tensor.to(state[key].dtype)), key
    if loaded is not None:
        assert loaded.count == len(expected) and "\n" not in str(loaded)


# ---- files as others write them


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def doubled(state):
    """Of a second copy, which is not to be taken."""
    return {key: 2 * value for key, value in state.items()}


def renamed(state, embeddings, layer, attention, parts, blocks, final):
    """`state` under other names: those of the class token, position and patches; of a block, of one
    part of its qkv, whose rows are taken apart, and of (pattern, name) the rest of it; of the norm
    behind them.
    """
    cls_token, position, patches = embeddings
    names = [(r"cls_token", cls_token), (r"pos_embed", position)]
    names += [(r"patch_embed\.proj\.(\w+)", rf"{patches}.\1"), (r"norm\.(\w+)", rf"{final}.\1")]
    names += [(rf"blocks\.(\d+)\.{old}\.(\w+)", rf"{layer}.\1.{new}") for old, new in blocks]
    found = {}
    for key, value in state.items():
        if match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(\w+)", key):
            for part, rows in zip(parts, value.chunk(3), strict=True):
                found[f"{layer}.{match[1]}.{attention.format(part)}.{match[2]}"] = rows.clone()
            continue
        for old, new in names:
            if re.fullmatch(old, key):
                key = re.sub(old, new, key)
                break
        found[key] = value
    return found


BERT = ("embeddings.cls_token", "embeddings.position_embeddings")
WORDS = ("query", "key", "value")


def hugging_face(state):
    blocks = (
        ("norm1", r"layernorm_before.\2"),
        ("norm2", r"layernorm_after.\2"),
        (r"attn\.proj", r"attention.output.dense.\2"),
        (r"mlp\.fc1", r"intermediate.dense.\2"),
        (r"mlp\.fc2", r"output.dense.\2"),
    )
    embeddings = (*BERT, "embeddings.patch_embeddings.projection")
    attention = "attention.attention.{}"
    return renamed(state, embeddings, "encoder.layer", attention, WORDS, blocks, "layernorm")


def hugging_face_dinov2(state):
    blocks = (
        (r"attn\.proj", r"attention.output.dense.\2"),
        ("ls1", "layer_scale1.lambda1"),
        ("ls2", "layer_scale2.lambda1"),
        (r"(norm\d|mlp\.fc\d)", r"\2.\3"),
    )
    embeddings = (*BERT, "embeddings.patch_embeddings.projection")
    attention, mask = "attention.attention.{}", {"embeddings.mask_token": torch.zeros(1, 32)}
    return mask | renamed(state, embeddings, "encoder.layer", attention, WORDS, blocks, "layernorm")


def hugging_face_clip(state):
    blocks = (
        (r"norm(\d)", r"layer_norm\2.\3"),
        (r"attn\.proj", r"self_attn.out_proj.\2"),
        (r"(mlp\.fc\d)", r"\2.\3"),
    )
    names = ("class_embedding", "position_embedding.weight", "patch_embedding")
    embeddings = [f"embeddings.{name}" for name in names]
    attention, final = "self_attn.{}_proj", "post_layernorm"
    found = renamed(state, embeddings, "encoder.layers", attention, "qkv", blocks, final)
    found = {k.replace("norm_pre.", "pre_layrnorm."): v for k, v in found.items()}
    found["embeddings.class_embedding"] = found["embeddings.class_embedding"].flatten()
    found["embeddings.position_embedding.weight"] = found["embeddings.position_embedding.weight"][0]
    found["embeddings.position_ids"] = torch.arange(17)[None]
    text = {"text_model.final_layer_norm.weight": torch.ones(32), "logit_scale": torch.ones(())}
    return text | {"visual_projection.weight": torch.ones(8, 32)} | under("vision_model.", found)


def published(state):
    """As the code of VPT and its descendants names a vision transformer."""
    blocks = (
        ("norm1", r"attention_norm.\2"),
        ("norm2", r"ffn_norm.\2"),
        (r"attn\.proj", r"attn.out.\2"),
        (r"mlp\.(fc\d)", r"ffn.\2.\3"),
    )
    embeddings, final = (*BERT, "embeddings.patch_embeddings"), "encoder.encoder_norm"
    found = renamed(state, embeddings, "encoder.layer", "attn.{}", WORDS, blocks, final)
    return under("transformer.", found)


def openai_clip(state):
    names = (
        ("patch_embed.proj", "conv1"),
        ("norm_pre", "ln_pre"),
        (".norm", ".ln_"),
        ("norm.", "ln_post."),
        ("attn.qkv.", "attn.in_proj_"),
        ("attn.proj", "attn.out_proj"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
        ("blocks.", "transformer.resblocks."),
    )
    found = {}
    for key, value in state.items():
        for old, new in names:
            key = key.replace(old, new)
        if key == "cls_token":
            key, value = "class_embedding", value.flatten()
        elif key == "pos_embed":
            key, value = "positional_embedding", value[0]
        found["visual." + key] = value
    text = {"token_embedding.weight": torch.ones(9, 8), "ln_final.weight": torch.ones(8)}
    return text | {"visual.proj": torch.ones(32, 8), "logit_scale": torch.ones(())} | found


def jax_archive(state, heads=2, prefix="", newer=False, stacked=False):
    """Arrays as the code of ViT and AugReg, or of Big Vision, names and lays them out."""
    attn, mlp, norm2 = (0, 0, 1) if newer else (1, 3, 2)
    position = "pos_embedding" if newer else "Transformer/posembed_input/pos_embedding"
    numpy = {key: value.numpy() for key, value in state.items()}
    width = numpy["norm.weight"].size
    found = {
        "embedding/kernel": numpy["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": numpy["patch_embed.proj.bias"],
        "cls": numpy["cls_token"],
        position: numpy["pos_embed"],
        "Transformer/encoder_norm/scale": numpy["norm.weight"],
        "Transformer/encoder_norm/bias": numpy["norm.bias"],
        "head/kernel": np.ones((width, 9), "f4"),
        "head/bias": np.ones(9, "f4"),
    }
    layers = []
    for i in range(1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))):
        own, layer = f"blocks.{i}.", {}
        for name, part in (("LayerNorm_0", "norm1"), (f"LayerNorm_{norm2}", "norm2")):
            layer[f"{name}/scale"] = numpy[f"{own}{part}.weight"]
            layer[f"{name}/bias"] = numpy[f"{own}{part}.bias"]
        attention = f"MultiHeadDotProductAttention_{attn}"
        weights = np.split(numpy[f"{own}attn.qkv.weight"], 3)
        biases = np.split(numpy[f"{own}attn.qkv.bias"], 3)
        for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            layer[f"{attention}/{part}/kernel"] = weight.T.reshape(width, heads, -1)
            layer[f"{attention}/{part}/bias"] = bias.reshape(heads, -1)
        out = numpy[f"{own}attn.proj.weight"].T.reshape(heads, -1, width)
        layer |= {f"{attention}/out/kernel": out}
        layer |= {f"{attention}/out/bias": numpy[f"{own}attn.proj.bias"]}
        for j in (0, 1):
            layer[f"MlpBlock_{mlp}/Dense_{j}/kernel"] = numpy[f"{own}mlp.fc{j + 1}.weight"].T
            layer[f"MlpBlock_{mlp}/Dense_{j}/bias"] = numpy[f"{own}mlp.fc{j + 1}.bias"]
        layers.append(layer)
    if stacked:
        for key in layers[0]:
            found[f"Transformer/encoderblock/{key}"] = np.stack([each[key] for each in layers])
    else:
        for i, layer in enumerate(layers):
            found |= {f"Transformer/encoderblock_{i}/{key}": each for key, each in layer.items()}
    return {prefix + key: np.ascontiguousarray(value) for key, value in found.items()}


OPTIONS = {
    "clip": {"pre_norm": True},
    "layer_scale": {"init_values": 1.0},
    "registers": {"reg_tokens": 2, "no_embed_class": True, "init_values": 1.0},
}

# {kind: (options of the model, what a file of its state dict holds, container, prefix)}
KINDS = {
    "timm": ({}, lambda s: s, "", ""),
    "with_head": ({}, lambda s: s | {"head.weight": torch.ones(9, 32)}, "", ""),
    "ddp": ({}, lambda s: {"state_dict": under("module.", s)}, "state_dict", "module."),
    "compiled": ({}, lambda s: under("_orig_mod.", s), "", ""),
    "compiled_ddp": ({}, lambda s: under("_orig_mod.module.", s), "", "module."),
    "ddp_compiled": ({}, lambda s: under("module._orig_mod.", s), "", "module."),
    "fsdp": (
        {},
        lambda s: {
            re.sub(r"(blocks\.\d+\.)", r"\1_fsdp_wrapped_module.", k): v
            for k, v in under("_fsdp_wrapped_module.", s).items()
        },
        "",
        "",
    ),
    "lightning": (
        {},
        lambda s: {
            "state_dict": under("model.backbone.", s) | {"model.head.weight": torch.ones(3, 32)},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
            "epoch": 3,
        },
        "state_dict",
        "model.backbone.",
    ),
    "moco_v3": (
        {},
        lambda s: {
            "epoch": 300,
            "state_dict": under("module.base_encoder.", s)
            | under("module.momentum_encoder.", doubled(s))
            | {"module.base_encoder.head.0.weight": torch.ones(4, 32)}
            | {"module.predictor.0.weight": torch.ones(4, 4)},
            "optimizer": {"state": {}},
        },
        "state_dict",
        "module.base_encoder.",
    ),
    "dino": (
        {},
        lambda s: {
            "student": under("module.backbone.", doubled(s)),
            "teacher": under("backbone.", s) | {"head.last_layer.weight_g": torch.ones(4, 1)},
            "args": argparse.Namespace(arch="vit"),
            "dino_loss": {"center": torch.ones(1, 4)},
        },
        "teacher",
        "backbone.",
    ),
    "ibot": (
        {},
        lambda s: {"state_dict": s | {"masked_embed": torch.ones(1, 32)}},
        "state_dict",
        "",
    ),
    "mae": (
        {},
        lambda s: {
            "model": s
            | {"mask_token": torch.ones(1, 1, 8), "decoder_pos_embed": torch.ones(1, 17, 8)}
            | {"decoder_blocks.0.norm1.weight": torch.ones(8)}
        },
        "model",
        "",
    ),
    "timm_ema": (
        {},
        lambda s: {"state_dict": doubled(s), "state_dict_ema": s},
        "state_dict_ema",
        "",
    ),
    "model_ema": (
        {},
        lambda s: {"model": doubled(s), "model_ema": under("module.", s)},
        "model_ema",
        "module.",
    ),
    "ema_pytorch": (
        {},
        lambda s: (
            under("ema_model.", s)
            | under("online_model.", doubled(s))
            | {"initted": torch.tensor(True), "step": torch.tensor(7)}
        ),
        "",
        "ema_model.",
    ),
    "averaged_model": (
        {},
        lambda s: under("module.", s) | {"n_averaged": torch.tensor(3)},
        "",
        "module.",
    ),
    "open_clip_timm": (
        {},
        lambda s: (
            under("visual.trunk.", s)
            | {"visual.head.proj.weight": torch.ones(8, 32), "text.ln_final.weight": torch.ones(8)}
        ),
        "",
        "visual.trunk.",
    ),
    "nested": ({}, lambda s: {"model": {"state_dict": s}}, "model.state_dict", ""),
    "dinov2": ("layer_scale", lambda s: s | {"mask_token": torch.ones(1, 32)}, "", ""),
    "dinov2_chunks": (
        "layer_scale",
        lambda s: {
            "teacher": under(
                "backbone.", {re.sub(r"^blocks\.(\d)", r"blocks.0.\1", k): v for k, v in s.items()}
            )
            | {"dino_head.mlp.0.weight": torch.ones(2, 2)}
        },
        "teacher",
        "backbone.",
    ),
    "dinov2_registers": (
        "registers",
        lambda s: (
            {k: v for k, v in s.items() if k != "reg_token"}
            | {"mask_token": torch.ones(1, 32), "register_tokens": s["reg_token"]}
            | {"cls_token": torch.zeros(1, 1, 32)}
            | {"pos_embed": torch.cat([s["cls_token"], s["pos_embed"]], 1)}
        ),
        "",
        "",
    ),
    "i_jepa": (
        {},
        lambda s: {
            "encoder": under("module.", s),
            "target_encoder": under("module.", doubled(s)),
            "predictor": {"module.norm.weight": torch.ones(8)},
        },
        "encoder",
        "module.",
    ),
    "byol": (
        {},
        lambda s: {
            "state_dict": under("online_encoder.net.", s)
            | under("target_encoder.net.", doubled(s))
            | {"online_predictor.net.0.weight": torch.ones(2, 2)}
        },
        "state_dict",
        "online_encoder.net.",
    ),
    "momentum_backbone": (
        {},
        lambda s: (
            under("backbone.", s)
            | under("momentum_backbone.", doubled(s))
            | {"momentum_projector.0.weight": torch.ones(2, 2), "queue_ptr": torch.zeros(1).long()}
        ),
        "",
        "backbone.",
    ),
    "timm_in_transformers": ({}, lambda s: under("timm_model.", s), "", "timm_model."),
    "linear_patches": (
        {},
        lambda s: s | {"patch_embed.proj.weight": s["patch_embed.proj.weight"].flatten(1)},
        "",
        "",
    ),
    "deit_3": (
        "layer_scale",
        lambda s: {"model": {re.sub(r"ls(\d)\.gamma", r"gamma_\1", k): v for k, v in s.items()}},
        "model",
        "",
    ),
    "openai_clip": ("clip", openai_clip, "", ""),
    "openai_clip_ddp": ("clip", lambda s: under("module.", openai_clip(s)), "", "module."),
    "hugging_face": (
        {},
        lambda s: under("vit.", hugging_face(s)) | {"classifier.weight": torch.ones(3, 32)},
        "",
        "vit.",
    ),
    "hugging_face_mae": (
        {},
        lambda s: under("vit.", hugging_face(s)) | {"decoder.mask_token": torch.ones(1, 1, 8)},
        "",
        "vit.",
    ),
    "hugging_face_bare": (
        {},
        lambda s: hugging_face(s) | {"pooler.dense.weight": torch.ones(32, 32)},
        "",
        "",
    ),
    "hugging_face_dinov2": ("layer_scale", hugging_face_dinov2, "", ""),
    "hugging_face_clip": ("clip", hugging_face_clip, "", "vision_model."),
    "vpt_code": ({}, lambda s: under("enc.", published(s)), "", "enc.transformer."),
}
