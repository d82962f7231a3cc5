"""load_weights: every tensor of the backbone is the file's, or one line says why not."""

from __future__ import annotations

import argparse
import os
import random
import re
import zipfile

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

import pae
from pae.backbones import load_weights
from pae.tensorfile import write_tensors
from tests.pae.weight_files import (
    KINDS,
    OPTIONS,
    assert_filled,
    backbone_of,
    hugging_face,
    jax_archive,
    under,
    vit,
)

FUZZ = int(os.environ.get("PAE_WEIGHTS_FUZZ", "30"))


@pytest.fixture(scope="module")
def models():
    """{name of options: a model}, from whose state dicts the files are made."""
    return {name: vit(**options) for name, options in {"": {}, **OPTIONS}.items()}


def made(kind, models):
    """(options of the model, backbone tensors, what the file holds, container, prefix)."""
    options, make, container, prefix = KINDS[kind]
    state = backbone_of(models[options or ""])
    return OPTIONS.get(options or "", {}), state, make(state), container, prefix


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_the_files(kind, models, tmp_path):
    options, state, content, container, prefix = made(kind, models)
    torch.save(content, tmp_path / "weights.pth")
    model = vit(**options)
    head = model.head.weight.clone()
    loaded = load_weights(model, tmp_path / "weights.pth")
    assert_filled(model, state, loaded)
    assert (loaded.container, loaded.prefix) == (container, prefix)
    assert torch.equal(model.head.weight, head)
    with torch.device("meta"):
        skeleton = VisionTransformer(
            img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=7, **options
        )
    assert str(load_weights(skeleton, tmp_path / "weights.pth")) == str(loaded)


@pytest.mark.parametrize(
    ("prefix", "newer", "stacked"),
    [
        ("", False, False),
        ("opt/target/", False, False),
        ("params/", True, False),
        ("params/img/", True, True),
    ],
)
def test_jax_archives(models, tmp_path, prefix, newer, stacked):
    state = backbone_of(models[""])
    arrays = jax_archive(state, prefix=prefix, newer=newer, stacked=stacked)
    if prefix == "params/img/":
        arrays |= {"params/t": np.ones((), "f4"), "params/txt/head/kernel": np.ones((2, 2), "f4")}
    np.savez(tmp_path / "weights.npz", **arrays)
    model = vit()
    head = {k: v.clone() for k, v in model.head.state_dict().items()}
    loaded = load_weights(model, tmp_path / "weights.npz")
    assert_filled(model, state, loaded)
    assert all(torch.equal(v, head[k]) for k, v in model.head.state_dict().items())
    assert (loaded.layout, loaded.prefix) == ("JAX", prefix)


def test_jax_archives_that_do_not_fit(models, tmp_path):
    state = backbone_of(models[""])
    whole = jax_archive(state)

    def refused(arrays, message, **options):
        np.savez(tmp_path / "weights.npz", **arrays)
        refuses(vit(**options), tmp_path / "weights.npz", message)

    lacking = {k: v for k, v in whole.items() if "encoderblock_1/LayerNorm_0" not in k}
    refused(lacking, "missing 2 of .*encoderblock_1/LayerNorm_0/scale, ")
    refused(whole, "unknown .*encoderblock_2", depth=2)
    refused(whole, "missing .*encoderblock_3", depth=4)
    kernel = r"embedding/kernel is \(8, 8, 3, 32\) for \(16, 16, 3, 32\)"
    refused(whole, kernel, patch_size=16)
    heads = r"query/kernel is \(32, 2, 16\) for \(32, 4, 8\)"
    refused(whole, heads, num_heads=4)
    name = "Transformer/encoderblock_2/MlpBlock_3/Dense_1/bias"
    refused(whole | {name: np.ones(1, "f4")}, rf"{name} is \(1,\) for \(32,\)")
    refused(whole | {name: whole[name].astype("i4")}, f"{name} is torch.int32")
    refused(whole | {name: np.full(32, np.nan, "f4")}, "NaN .* in blocks.2.mlp.fc2.bias")
    refused(whole | {"adapter/kernel": np.ones(1, "f4")}, "unknown 1: adapter/kernel")
    refused(whole, "NaN .* in blocks.0.ls1.gamma", init_values=1.0)
    with pytest.raises(pae.CheckpointError, match="read into vision transformers alone"):
        load_weights(timm.create_model("test_resnet"), tmp_path / "weights.npz")
    refused(whole, "vision transformers alone", pos_embed="none")
    stacked = jax_archive(state, prefix="params/", newer=True, stacked=True)
    refused(stacked, r"kernel is \(3, 2, 16, 32\) for \(2, 2, 16, 32\)", depth=2)
    np.savez(tmp_path / "objects.npz", **whole, more=np.array([print, None], dtype=object))
    refuses(vit(), tmp_path / "objects.npz", "cannot be read.*[Pp]ickle|allow_pickle")


@pytest.mark.parametrize("kind", ["timm", "hugging_face", "openai_clip", "jax"])
def test_another_image_size(kind, models, tmp_path):
    """The position embedding is timm's resampling of the file's; all else is the file's."""
    path = tmp_path / "weights"
    if kind == "jax":
        options, state = {}, backbone_of(models[""])
        with path.open("wb") as file:
            np.savez(file, **jax_archive(state))
    else:
        options, state, content, _, _ = made(kind, models)
        torch.save(content, path)
    model = vit(img_size=48, **options)
    loaded = load_weights(model, path)
    assert "pos_embed resampled from 17 to 37 positions" in str(loaded)
    mode = {"interpolation": "bilinear", "antialias": False} if kind == "jax" else {}
    state["pos_embed"] = timm.layers.resample_abs_pos_embed(state["pos_embed"], [6, 6], **mode)
    assert_filled(model, state, loaded)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("end", ["safetensors", "pth", "legacy"])
def test_types_and_formats(models, tmp_path, dtype, end):
    state = {k: v.to(dtype) for k, v in backbone_of(models[""]).items()}
    path = tmp_path / "weights.anything"
    if end == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=end == "pth")
    model = vit()
    assert_filled(model, state, load_weights(model, path))
    assert_filled(vit_like := vit(), backbone_of(vit_like))
    load_weights(vit_like, {k: v.numpy() for k, v in backbone_of(models[""]).items()})
    assert_filled(vit_like, backbone_of(models[""]))


def test_files_of_pae(models, tmp_path):
    """A fine-tuned backbone is checked by its digest; prompts are told for what they are."""
    state = backbone_of(models[""])
    path = tmp_path / "full.safetensors"
    write_tensors(path, state, {"pae": "{}"})
    model = vit()
    assert_filled(model, state, load_weights(model, path))
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(pae.CheckpointError, match=f"{path} cannot be read: .*damaged"):
        load_weights(vit(), path)
    pae.PromptedViT(vit(), pae.prompts.VPTDeep(2)).save(path)
    refuses(vit(), path, "missing 42 of 42.*; trained prompts are no backbone: ")
    refuses(vit(), {"shallow_prompt": np.ones((1, 4, 32), "f4")}, "trained prompts are no backb")


# ---- what is refused, in one line, with the model as it was


def refuses(model, source, message, **options):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(pae.CheckpointError, match=message) as caught:
        load_weights(model, source, **options)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("weights ")
    if not isinstance(source, dict):
        assert str(source) in str(caught.value)
    return before


@pytest.mark.parametrize("kind", KINDS)
def test_mutations_are_refused(kind, models, tmp_path):
    """A block dropped, a tensor renamed, transposed, of other numbers: nothing is loaded."""
    options, _, _, container, prefix = made(kind, models)
    path = tmp_path / "weights.pth"
    model = vit(**options)
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def table(content):
        for key in container.split(".") if container else ():
            content = content[key]
        return content

    def mutate(change):
        _, _, content, _, _ = made(kind, models)
        inside = {k: v for k, v in table(content).items() if block(k, 2)}
        change(table(content), inside)
        torch.save(content, path)

    def block(key, index):
        plain = re.sub(r"_orig_mod\.|_fsdp_wrapped_module\.", "", key)
        plain = plain.replace("blocks.0.2", "blocks.2")
        return re.match(
            re.escape(prefix) + rf"(\w+\.)*(blocks|layers?|resblocks)\.{index}\.", plain
        )

    def drop(table, inside):
        assert len(inside) >= 12
        for key in inside:
            del table[key]

    def rename(table, inside):
        key = next(
            k for k in inside if k.endswith("fc1.weight") or "fc.weight" in k or "inter" in k
        )
        table[key.replace(".weight", ".wait")] = table.pop(key)

    def transpose(table, inside):
        key = next(k for k in inside if inside[k].dim() == 2 and len(set(inside[k].shape)) == 2)
        table[key] = table[key].T.contiguous()

    def infinite(table, inside):
        key = max(inside)
        table[key] = table[key].clone()
        table[key].view(-1)[3] = torch.inf

    def integers(table, inside):
        key = max(inside)
        table[key] = table[key].to(torch.int8)

    def extra(table, inside):
        table |= {k.replace(".2.", ".7."): v for k, v in inside.items()}

    for change, message in (
        (drop, r"missing \d+ of \d+: blocks\.2\."),
        (rename, r"missing 1 of \d+: blocks\.2\.mlp\.fc1\.weight.*unknown 1"),
        (transpose, r"wrong shape 1: blocks\.2\.\S+ is \(\d+, \d+\) for|refuses them"),
        (infinite, r"NaN or infinite values in blocks\.2\."),
        (integers, r"wrong type 1: \S+2\.\S+ is torch.int8|refuses them"),
        (extra, r"unknown \d+: .*\.7\."),
    ):
        mutate(change)
        refuses(model, path, message)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_other_sizes_are_named(models):
    state = backbone_of(models[""])
    refuses(
        vit(embed_dim=64), state, r"wrong shape \d+: cls_token is \(1, 1, 32\) for \(1, 1, 64\)"
    )
    refuses(vit(depth=4), state, r"missing 12 of 54: blocks\.3\.")
    refuses(vit(depth=2), state, r"unknown 12: blocks\.2\.")
    patches = (
        r"patch_embed.proj.weight is \(32, 3, 8, 8\) for \(32, 3, 16, 16\), patches of another"
    )
    refuses(vit(patch_size=16), state, patches)
    refuses(vit(in_chans=1), state, r"weight is \(32, 3, 8, 8\) for \(32, 1, 8, 8\)")
    refuses(vit(), {k: v for k, v in state.items() if "qkv.bias" not in k}, "missing 3 .*qkv.bias")
    unbiased = vit(qkv_bias=False)
    refuses(unbiased, state, r"unknown 3: blocks.0.attn.qkv.bias")
    refuses(vit(class_token=False, global_pool="avg", fc_norm=False), state, "cls_token|refuses")
    refuses(vit(reg_tokens=1), state, r"missing 1 .*reg_token|refuses them")
    refuses(vit(), state | {"pos_embed": torch.ones(1, 14, 32)}, "pos_embed|refuses them")
    refuses(vit(), state | {"dist_token": torch.ones(1, 1, 32)}, "unknown 1: dist_token")
    refuses(vit(), state | {"prompt_embeddings": torch.ones(1, 4, 32)}, "unknown 1: prompt_emb")
    lora = {"blocks.0.attn.qkv.lora_A.weight": torch.ones(4, 32)}
    refuses(vit(), state | lora, "unknown 1: blocks.0.attn.qkv.lora_A.weight")
    quantised = {k: torch.quantize_per_tensor(v, 1, 0, torch.qint8) for k, v in state.items()}
    refuses(vit(), quantised, r"wrong type 42: ")


def test_a_tensor_that_is_there_twice(models, tmp_path):
    state = backbone_of(models[""])
    torch.save(state | {"_orig_mod.norm.bias": state["norm.bias"]}, tmp_path / "twice.pth")
    refuses(vit(), tmp_path / "twice.pth", "norm.bias is there twice")


def test_what_cannot_be_converted_does_not_hide_what_fits(models):
    """timm's converter stumbles over the average, which is one of another network."""
    state = backbone_of(models[""])
    other = {"visual.class_embedding": torch.ones(4), "visual.proj": torch.ones(3)}
    other["visual.positional_embedding"] = torch.ones(3)
    model = vit()
    loaded = load_weights(model, {"ema": other, "model": state})
    assert_filled(model, state, loaded)
    assert loaded.container == "model"
    refuses(vit(), {"ema": other}, "do not fit")


def test_query_key_and_value_that_do_not_go_together(models):
    state = hugging_face(backbone_of(models[""]))
    key = "encoder.layer.1.attention.attention.query.weight"
    refuses(vit(), state | {key: torch.ones(32, 16)}, "query, key and value do not go together")
    refuses(vit(), state | {key: torch.ones(16, 32)}, r"blocks.1.attn.qkv.weight is \(80, 32\)")
    refuses(vit(), {k: v for k, v in state.items() if k != key}, "missing 1 .*1.attn.qkv.weight")
    refuses(vit(), state | {key: torch.ones(32, 32, dtype=torch.int8)}, f"wrong type 1: {key}")


def test_arrays_and_tensors_without_numbers(models):
    state = backbone_of(models[""])
    model = vit()
    load_weights(model, {k: v.numpy().astype(">f8") for k, v in state.items()})
    assert_filled(model, state)
    refuses(vit(), state | {"norm.bias": torch.ones(32, device="meta")}, "NaN .* in norm.bias")
    strange = {"norm.bias": np.array(["a"] * 32)}
    refuses(vit(), state | strange, "missing 1 of 42: norm.bias")
    refuses(vit(), state | {"norm.bias": np.ones(32, np.longdouble)}, "missing 1 .*norm.bias")
    refuses(vit(), state | {"norm.bias": torch.ones(32).to_sparse()}, "wrong type 1: norm.bias")


def test_the_preferred_copy_is_not_replaced_by_another(models):
    state = backbone_of(models[""])
    lacking = {k: v for k, v in state.items() if "blocks.1." not in k}
    refuses(vit(), {"teacher": lacking, "student": state}, "missing 12 .*blocks.1.")
    both = under("teacher.backbone.", lacking) | under("student.backbone.", state)
    refuses(vit(), {"state_dict": both}, "missing 12 .*blocks.1.")


@pytest.mark.parametrize(
    "names",
    [
        lambda k: k.replace("blocks.", "layers.").replace("norm", "ln"),  # MMPretrain
        lambda k: "sam." + k,
        lambda k: k.replace(".", "/"),
    ],
)
def test_unknown_layouts(models, names):
    state = {names(k): v for k, v in backbone_of(models[""]).items()}
    refuses(vit(), {"state_dict": state}, r"missing \d+ of 42: .*; unknown \d+: ")


def test_what_holds_no_state_dict(models, tmp_path):
    refuses(vit(), {"epoch": 3, "args": {}}, "expected a state dict, it holds epoch, args")
    refuses(vit(), {}, "it holds nothing")
    refuses(vit(), {"optimizer": backbone_of(models[""])}, "expected a state dict")
    torch.save([torch.ones(3)], tmp_path / "list.pth")
    refuses(vit(), tmp_path / "list.pth", "expected a state dict, got list")
    torch.save(torch.ones(3), tmp_path / "tensor.pth")
    refuses(vit(), tmp_path / "tensor.pth", "expected a state dict, got Tensor")


# ---- files that are none


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_no_code_of_a_file_is_run(models, tmp_path):
    state = backbone_of(models[""])
    target = tmp_path / "exploded"
    for zipped in (True, False):
        for content in (Bomb(str(target)), {"state_dict": state, "more": Bomb(str(target))}):
            path = tmp_path / "bomb.pth"
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
            refuses(vit(), path, "mkdir")
            assert not target.exists()
    torch.save(vit(), path)
    refuses(vit(), path, "code would have to run: .*; save its state dict alone")


def test_settings_beside_weights_are_left_alone(models, tmp_path):
    state = backbone_of(models[""])
    beside = {"args": argparse.Namespace(lr=1), "best": np.float64(3), "mean": np.ones(3)}
    torch.save({"model": state, **beside}, tmp_path / "weights.pth")
    model = vit()
    loaded = load_weights(model, tmp_path / "weights.pth")
    assert_filled(model, state, loaded)
    assert "not read: 3 other entries" in str(loaded)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit")
def test_what_is_no_file_of_weights(tmp_path):
    path = tmp_path / "weights.pth"
    refuses(vit(), path, "no such file")
    refuses(vit(), tmp_path, "not a file")
    os.mkfifo(tmp_path / "pipe")
    refuses(vit(), tmp_path / "pipe", "not a file")
    for content, message in (
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\x89HDF\r\n\x1a\n", "expected a .safetensors, .npz or torch file"),
        (b"PK\x03\x04", "damaged"),
        (b"\x80\x02", "damaged"),
        (b"\x08" + bytes(7) + b"{", "damaged"),
        (b"text", "begins with b'text'"),
    ):
        path.write_bytes(content)
        refuses(vit(), path, message)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("photo.jpg", b"1")
    refuses(vit(), path, "zip archive of other things")
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    refuses(vit(), path, "TorchScript")


@pytest.mark.parametrize("end", ["pth", "legacy", "npz", "safetensors"])
def test_damaged_files(models, tmp_path, end):
    """Cut off, overwritten, with a bit turned: refused by name, or loaded, and nothing else.

    PAE_WEIGHTS_FUZZ=500 tries as many of each format. In torch's zip archives and in .npz every
    change of a tensor is seen; .safetensors and torch's old format have no checksums.
    """
    state = backbone_of(models[""])
    path = tmp_path / "weights"
    if end == "safetensors":
        save_file(state, path)
    elif end == "npz":
        with path.open("wb") as file:
            np.savez(file, **jax_archive(state))
    else:
        torch.save({"model": state}, path, _use_new_zipfile_serialization=end == "pth")
    whole = path.read_bytes()
    model, random_ = vit(), random.Random(0)
    refused = 0
    for trial in range(FUZZ):
        damaged = bytearray(whole)
        # half of the damage hits the first or last kilobytes, where the names are
        where = random_.choice([len(whole), 3000, -9000])
        at = random_.randrange(where) if where > 0 else len(whole) + random_.randrange(where, 0)
        match trial % 4:
            case 0:
                del damaged[at:]
            case 1:
                damaged[at] ^= 1 << random_.randrange(8)
            case 2:
                damaged[at : at + 16] = random_.randbytes(16)
            case 3:
                del damaged[at : at + random_.randrange(1, 64)]
        if damaged == whole:
            continue
        path.write_bytes(damaged)
        try:
            load_weights(model, path)
        except pae.CheckpointError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
        else:
            if end in ("pth", "npz"):  # the damage was in what no reader looks at
                assert_filled(model, state)
    assert refused >= FUZZ // 3
