"""Every prompt family through the training loop: it learns, resumes bit for bit, and its published
settings load.
"""

import json

import pytest
import torch

import pae
from pae.train import cli, declared, options
from pae.train.methods import (
    build_backbone,
    build_method,
    build_prompts,
    trained_parameters,
)
from pae.train.options import Options
from tests.train.helpers import BACKBONE_FLAGS, CPU_FLAGS, save_shades
from tests.train.test_train_loop import (
    PAE,
    Stop,
    assert_same_run,
    numbers,
    run,
    settings,
    stop_after,
)

CONFIGS = list(options.shipped().values())

BPT = ["--method", "bpt", "--method-args"]
RUNS = {
    "bpt": {"method_args": {"rank": 4}},
    "bpt-shallow": {"method_args": {"rank": 4}},
    "vapt": {"dropout": 0.1},
    "ivpt": {"method_args": {"num_reinforced": 3}},
    "vfpt": {"method_args": {"fraction": 0.5}},
    "vfpt-shallow": {},
    "pro-vpt": {"dropout": 0.2, "method_args": {"sweep": "extra"}},
    "e2vpt": {"method_args": {"num_kv": 2, "masks": "learned", "pieces": 8}},
    "da-vpt": {"num_tokens": 3},
    "lspt": {"method_args": {"hidden": 8}},
    "apt": {},
    "apt-vl": {},
}


@pytest.fixture(scope="module")
def shades(tmp_path_factory):
    return save_shades(tmp_path_factory.mktemp("shades"))


def test_every_family_is_run_here():
    assert {"vpt-deep", "vpt-shallow", *RUNS} == set(pae.prompts.METHODS)


@pytest.mark.parametrize("method", RUNS)
def test_learns(shades, tmp_path, method):
    result = run(shades, tmp_path, method=method, **RUNS[method])
    assert result["val_accuracy"] > 0.5 and result["test_accuracy"] > 0.5  # a third by chance
    rows, *_ = numbers(tmp_path)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    model = pae.PromptedViT.from_file(
        tmp_path / "best.safetensors", backbone(shades, method, tmp_path)
    )
    assert type(model.prompts) is pae.prompts.METHODS[method]


def backbone(shades, method, folder):
    torch.manual_seed(json.loads((folder / "config.json").read_text())["settings"]["seed"])
    return build_backbone(settings(shades, method=method, **RUNS[method]), 3)


def test_on_a_backbone_that_averages(shades, tmp_path, capsys):
    """A class token's readout is made a mean, with the prompts in it; the probe's is one too."""
    made = {"method": "bpt", **RUNS["bpt"], "pool": "all"}
    assert run(shades, tmp_path / "a", **made)["val_accuracy"] > 0.5
    torch.manual_seed(settings(shades, **made).seed)
    vit = build_backbone(settings(shades, **made), 3)
    assert vit.global_pool == "avg" and vit.fc_norm.weight.eq(1).all()
    model = pae.PromptedViT.from_file(tmp_path / "a" / "best.safetensors", vit)
    assert model.pool == "all" and not vit.fc_norm.weight.requires_grad
    probe = build_method(settings(shades, method="linear", pool="all"), 3)
    assert probe.frozen.backbone.global_pool == "avg" and probe.frozen.pool == "image"
    flags = ["train", "--data", str(shades), "--method", "bpt", *BACKBONE_FLAGS, *CPU_FLAGS]
    assert cli.main([*flags, "--method-args", "rank=3", "--epochs", "1", "--pool", "prompts"]) == 0
    said = capsys.readouterr()
    assert "readout: the class token's is replaced by a mean of rows and a new norm" in str(said)


@pytest.mark.parametrize("method", ["bpt", "vfpt", "ivpt", "e2vpt"])
def test_with_pae(shades, tmp_path, method):
    run(shades, tmp_path, method=method, **RUNS[method], **PAE)
    _, _, tensors = numbers(tmp_path)
    assert any("kld" in name for name in tensors)


@pytest.mark.parametrize(
    "method, updates", [("pro-vpt", 6), ("pro-vpt", 9), ("da-vpt", 5), ("vapt", 6), ("lspt", 3)]
)
def test_stopped_run_goes_on_bit_for_bit(shades, tmp_path, monkeypatch, method, updates):
    changes = {"method": method, **RUNS[method], "save_every_steps": 1}
    run(shades, tmp_path / "whole", **changes)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, updates)
        run(shades, tmp_path / "cut", **changes)
    torch.rand(11)
    run(shades, tmp_path / "cut", resume="last", **changes)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_biases_of_the_backbone(shades, tmp_path, monkeypatch):
    """Trained, saved, gone on with bit for bit, and counted."""
    changes = {"method": "vpt-deep", "train_backbone": "da-vpt+", "save_every_steps": 1}
    run(shades, tmp_path / "whole", **changes)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 6)
        run(shades, tmp_path / "cut", **changes)
    run(shades, tmp_path / "cut", resume="last", **changes)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    plain = build_method(settings(shades, method="vpt-deep"), 3)
    model = build_method(settings(shades, **changes), 3)
    depth, width = model.view.shape.depth, model.view.shape.width
    more = trained_parameters(model) - trained_parameters(plain)
    assert more == width + depth * width * (2 + 2 + 1 + 1 + 1)
    file = tmp_path / "whole" / "best.safetensors"
    assert pae.read_checkpoint(file).train_backbone == model.trained_backbone


def test_biases_on_the_command_line(shades, tmp_path, capsys):
    flags = ["train", "--data", str(shades), *BACKBONE_FLAGS, *CPU_FLAGS, "--epochs", "1"]
    flags += ["--output", str(tmp_path / "run"), "--method", "vpt-deep", "--train-backbone"]
    assert cli.main([*flags, "blocks.0.attn.qkv.weight"]) == 2
    said = capsys.readouterr().err
    assert "--train-backbone blocks.0.attn.qkv.weight: " in said and said.count("\n") == 1
    assert cli.main([*flags, "biases"]) == 0
    names = pae.read_checkpoint(tmp_path / "run" / "best.safetensors").train_backbone
    assert "patch_embed.proj.bias" in names and "norm.bias" in names


def test_pro_vpt_moves_prompts_in_training(shades, tmp_path):
    run(shades, tmp_path, method="pro-vpt", epochs=4, num_tokens=3, lr=0.1)
    _, _, tensors = numbers(tmp_path)
    table = [t for name, t in tensors.items() if name.endswith("prompts.table")]
    assert table and any(not torch.equal(t, torch.arange(len(t))) for t in table)


def test_da_vpt_groups_classes_before_the_first_epoch(shades, tmp_path, monkeypatch):
    calls = []
    remap = pae.prompts.DAVPT.remap
    monkeypatch.setattr(
        pae.prompts.DAVPT, "remap", lambda self, *a: (calls.append(1), remap(self, *a))
    )
    run(shades, tmp_path, method="da-vpt", num_tokens=3)
    assert len(calls) == 3
    _, _, tensors = numbers(tmp_path)
    centroids = next(t for name, t in tensors.items() if name.endswith("prompts.centroids"))
    assert centroids.any()


@pytest.mark.parametrize("spt", ["random", "mean_pooling"])
def test_spt_start(shades, tmp_path, spt):
    run(shades, tmp_path / "spt", method="vpt-deep", spt=spt, epochs=1)
    run(shades, tmp_path / "plain", method="vpt-deep", epochs=1)
    tokens = [
        numbers(tmp_path / name)[2]["best.safetensors/prompts.tokens".replace(".safetensors", "")]
        for name in ("spt", "plain")
    ]
    assert tokens[0].norm() != tokens[1].norm()


# ---- options and configuration files


# those of pairs, for two towers, are built in test_two_towers
OF_IMAGES = [p for p in CONFIGS if options.read_config(p)["method"] not in pae.prompts.PAIRS]


@pytest.mark.parametrize("path", OF_IMAGES, ids=lambda p: p.stem)
def test_published_settings(path):
    """They load, are complete, and fit a ViT-B/16."""
    given = options.read_config(path)
    chosen = Options(**given).resolved()
    assert {"method", "optimizer", "lr", "weight_decay", "epochs", "batch_size"} <= given.keys()
    prompts = build_prompts(chosen, 100)
    shape = pae.prompts.BackboneShape(12, 768, 12, (16, 16), 3, 197, 1, (14, 14), 64, True)
    prompts.bind(shape)
    assert sum(p.numel() for p in prompts.parameters()) > 0


def test_published_settings_of_da_vpt_are_of_the_plus():
    """With what is trained of the backbone, and what it drops, which the command line takes out."""
    path = options.find_config("da-vpt")
    tiny = {"model": "test_vit", "pretrained": False, "img_size": 32}
    chosen, _ = options.combine(path, options.read_config(path), tiny)
    model = build_method(chosen.resolved(), 20)
    kinds = {type(part).__name__ for part in model.backbone.modules()}
    assert chosen.engine == "reference" and "DropPath" in kinds
    assert model.trained_backbone[:2] == ("cls_token", "blocks.0.norm1.weight")
    assert model.view.shape.depth * 5 + 1 < len(model.trained_backbone)
    line = {"drop_path": 0.0, "engine": "fast"}
    faster, _ = options.combine(path, options.read_config(path), line | tiny)
    again = build_method(faster.resolved(), 20)
    assert again.trained_backbone == model.trained_backbone
    assert "DropPath" not in {type(part).__name__ for part in again.backbone.modules()}


def test_every_family_has_published_settings():
    methods = {options.read_config(path)["method"] for path in CONFIGS}
    assert methods >= set(pae.prompts.METHODS) - {"vfpt-shallow"}


def test_command_line_wins_over_the_file(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('method = "bpt"\nlr = 0.5\nnum_tokens = 7\n[method_args]\nrank = 3\n')
    line = {"lr": 0.25, "method_args": {"trained_bases": 1}}
    chosen, given = options.combine(path, options.read_config(path), line)
    expected = {"rank": 3, "trained_bases": 1}
    assert chosen == Options(method="bpt", lr=0.25, num_tokens=7, method_args=expected)
    assert given.files == {"method": str(path), "num_tokens": str(path)}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("rank=16", ("rank", 16)),
        ("dropout_scope=sample", ("dropout_scope", "sample")),
        ("proxy_blocks=[1, 2]", ("proxy_blocks", [1, 2])),
        ("share_kv=False", ("share_kv", False)),
        ("share_kv=true", ("share_kv", True)),
        ("hidden=None", ("hidden", None)),
        ("a=b=c", ("a", "b=c")),
    ],
)
def test_option_values(text, expected):
    assert declared.name_and_value(text, "--method-args") == expected


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--method-args", "rank"], "--method-args rank: expected NAME=VALUE"),
        ([*BPT, "rnk=3"], "bpt has no rnk; it has rank, trained_bases; did you mean rank?"),
        ([*BPT, "rank=x"], "--method-args rank=x: expected an integer as rank, got 'x'"),
        ([*BPT, "rank=3.0"], "--method-args rank=3.0: expected an integer as rank"),
        ([*BPT, "rank=0"], "--method-args rank=0: rank must be at least 1, got 0"),
        ([*BPT, "rank=65"], "--method-args rank=65: rank must be at most the backbone's width 64"),
        ([*BPT, "num_tokens=3"], "num_tokens is --num-tokens"),
        ([*BPT, "rank=3", "--dropout", "0.1"], "--dropout 0.1: bpt has no dropout"),
        (["--method", "vfpt", "--method-args", "blocks=[0.5]"], "or a list, each an integer"),
        (
            ["--method", "linear", "--pool", "prompts"],
            "--pool prompts needs a --method with prompts",
        ),
        (["--method", "compare", "--pool", "prompts"], "--pool prompts needs a --method with"),
        (["--method", "apt", "--pool", "prompts"], "--pool prompts: pool must be 'image' or 'all'"),
        (
            ["--method", "bpt", "--pool", "mean"],
            "--pool mean: expected one of own, image, all, pro",
        ),
        (["--method", "linear", "--method-args", "rank=3"], "rank=3 needs a --method with prompts"),
        (["--method", "linear", "--dropout", "0.1"], "--dropout 0.1 needs a --method with prompts"),
        (["--method", "da-vpt", "--method-args", "num_classes=3"], "number of classes of the"),
        (["--method", "vpt-deep", "--mpa", "--spt", "random"], "exclude each other"),
        (["--method", "bpt-shallow", "--kld"], "block 0 alone"),
        (["--method", "apt", "--kld"], "--kld: kld pairs the prompts"),
        (["--method", "pro-vpt", "--kld"], "--kld: kld pairs prompt j"),
        (["--method", "vapt", "--mpa"], "--mpa: model.prompts (VAPT) computes its prompts"),
        (["--config", "gone.toml"], "gone.toml"),
    ],
)
def test_combinations_that_cannot_be(shades, capsys, flags, message):
    assert cli.main(["train", "--data", str(shades), *BACKBONE_FLAGS, *CPU_FLAGS, *flags]) != 0
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, message",
    [
        ("lr = ", "a.toml"),
        ("learning_rate = 1", "a.toml: there is no option learning_rate"),
        ("num_token = 1", "a.toml: there is no option num_token; did you mean num_tokens"),
        ('method = "bpt"', "a.toml is for bpt"),
        ("lr = 1\nlr = 2", "a.toml: "),
        ("family = {}\nmethod_args = {}", "method_args is given twice, once by its former name"),
    ],
)
def test_bad_configuration(tmp_path, capsys, text, message):
    path = tmp_path / "a.toml"
    path.write_text(text)
    assert cli.main(["train", "--config", str(path), "--method", "vapt"]) != 0
    assert message in capsys.readouterr().err
