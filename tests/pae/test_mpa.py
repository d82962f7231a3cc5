"""Modal Pre-Alignment: golden vectors, the plain loop of the benchmarks as oracle, and manners."""

import random

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import pae
from bench.peers import mpa as peers
from pae import mpa
from pae.choices import MPA_HEADS
from pae.mpa import losses as mpa_losses
from pae.mpa import probe as mpa_probe
from pae.prompts import VPTDeep, VPTShallow
from pae.prompts.base import PromptFamily
from pae_kernels.spectrum import shortcut_images


def small_vit(dtype=torch.float64, **options):
    """A timm ViT of 3 blocks with lively random weights."""
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        vit = VisionTransformer(**{**shape, "mlp_ratio": 2, "num_classes": 4, **options})
        for p in vit.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    return vit.to(dtype)


def small_model(dtype=torch.float64, prompts=None, kld=None, **options):
    return pae.PromptedViT(small_vit(dtype, **options), prompts or VPTDeep(3), kld=kld)


def batch(size=(16, 16), count=3, dtype=torch.float64, classes=4):
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(count, 3, *size, dtype=dtype, generator=generator)
    return images, torch.randint(classes, (count,), generator=generator)


SMALL = {"window": 6, "stride": 5}  # 9 windows in 16 x 16


@pytest.fixture
def golden_batch(golden):
    data = golden("data")
    return torch.from_numpy(data["images"]), torch.from_numpy(data["labels"])


# ---- golden vectors

PRECISION = {  # kind -> dtype, losses (absolute), prompts (relative), logits (absolute)
    "f64": (torch.float64, 1e-9, 1e-6, 1e-9),
    "f32": (torch.float32, 1e-5, 1e-5, 1e-5),
}


@pytest.mark.parametrize("kind", ["f64", "f32"])
def test_golden(kind, golden, golden_batch, tiny_vit):
    dtype, loss_tolerance, prompt_tolerance, logit_tolerance = PRECISION[kind]
    expected = golden("pae_mpa")
    images, labels = golden_batch[0].to(dtype), golden_batch[1]
    model = pae.PromptedViT(tiny_vit(dtype), VPTDeep(5))
    result = pae.mpa_init(model, images, labels, window=8, stride=4)

    def error(ours, name):
        return (ours - torch.from_numpy(expected[name])).abs().max()

    assert (result.window, result.stride, result.head) == (8, 4, "as_is")
    assert result.losses.dtype == dtype
    assert torch.equal(result.origins, torch.from_numpy(expected["window_origins"]))
    assert error(result.losses, f"{kind}/losses") < loss_tolerance
    assert loss_tolerance < expected["min_gap"] / 10  # so the ranking cannot hang on rounding
    assert result.selected.tolist() == expected[f"{kind}/top_indices"].tolist()
    top = torch.from_numpy(expected["top_origins"])
    assert torch.equal(result.origins[result.selected], top)

    tokens = model.prompts.tokens.detach()
    assert tokens.dtype == dtype
    for ours, name in ((tokens[0], "prompt_shallow"), (tokens[1:], "prompt_deep")):
        theirs = torch.from_numpy(expected[f"{kind}/{name}"])
        assert (ours - theirs).norm() / theirs.norm() < prompt_tolerance

    with torch.no_grad():
        model.eval()
        assert error(model(images), f"{kind}/logits_after_init") < logit_tolerance
        assert error(pae.fast_forward(model, images), f"{kind}/logits_after_init") < logit_tolerance


@pytest.mark.parametrize("kind", ["f64", "f32"])
def test_golden_statistics_of_the_best_window(kind, golden, golden_batch, tiny_vit):
    dtype = PRECISION[kind][0]
    expected = golden("pae_mpa")
    images = golden_batch[0].to(dtype)
    origin = torch.from_numpy(expected["top_origins"][:1])
    filtered = shortcut_images(torch.fft.fft2(images), origin, 8, (32, 32))[0]
    torch.testing.assert_close(
        filtered[0].float(),
        torch.from_numpy(expected[f"{kind}/top0_filtered_image0"]),
        atol=2e-6,
        rtol=0,
    )
    model = pae.PromptedViT(tiny_vit(dtype), VPTDeep(5))
    with torch.no_grad():
        energy = model.view.embed(filtered)[:, 1:].square().sum(-1)
    torch.testing.assert_close(
        energy, torch.from_numpy(expected[f"{kind}/top0_token_energy"]), rtol=2e-6, atol=0
    )


# ---- the plain loop as oracle

BACKBONES = {
    "plain": {},
    "average pooling": {"global_pool": "avg"},
    "no class token": {"global_pool": "avg", "class_token": False},
    "average of all rows, plain norm": {"global_pool": "avg", "fc_norm": False},
    "register tokens": {"reg_tokens": 2},
    "layer scale": {"init_values": 0.5},
    "norm before the blocks": {"pre_norm": True},
    "head norms": {"qk_norm": True},
    "non-square image": {"img_size": (12, 20)},
    "non-square patch": {"img_size": (12, 20), "patch_size": (2, 5)},
    "dynamic image size": {"dynamic_img_size": True, "images": (20, 12)},
    "padded image size": {"dynamic_img_size": True, "dynamic_img_pad": True, "images": (15, 18)},
    "odd image size": {"img_size": 15, "patch_size": 5},
}


def plain_losses(model, head, images, labels, deep=True):
    """Every window's loss (S,) with 3 zero prompts in place, and its origin, by the plain loop."""
    vit, (window, stride) = model.backbone, SMALL.values()
    origins = peers.windows_of(tuple(images.shape[-2:]), window, stride)
    zeros = [images.new_zeros(3, vit.embed_dim)] * len(vit.blocks)
    logits = lambda filtered: peers.prompted_logits(vit, head, filtered, zeros, deep)
    return peers.window_losses(logits, images, labels, origins, window), origins


@pytest.mark.parametrize("family", [VPTDeep, VPTShallow])
@pytest.mark.parametrize("name", BACKBONES)
def test_equals_the_plain_loop(name, family):
    options = dict(BACKBONES[name])
    images, labels = batch(options.pop("images", None) or _pair(options.get("img_size", 16)))
    model = small_model(prompts=family(3), **options)
    deep = family is VPTDeep
    losses, origins = plain_losses(model, model.head, images, labels, deep)
    result = pae.mpa_init(model, images, labels, **SMALL)
    torch.testing.assert_close(result.losses, losses, rtol=1e-10, atol=1e-10)
    assert result.origins.tolist() == [list(origin) for origin in origins]
    assert result.selected.tolist() == losses.argsort(stable=True)[:3].tolist()

    chosen = [origins[i] for i in result.selected]
    prompts = peers.official_style_prompts(model.backbone, images, chosen, SMALL["window"], deep)
    tokens = model.prompts.tokens.detach()
    torch.testing.assert_close(
        tokens, torch.stack(prompts) if deep else prompts[0], rtol=1e-9, atol=1e-9
    )


def _pair(size):
    return size if isinstance(size, tuple) else (size, size)


def test_the_number_of_zero_prompts_matters():
    """The prompts are in place while windows are ranked: P keys of weight 1, not one, not none."""
    images, labels = batch()
    results = [
        pae.mpa_init(small_model(prompts=VPTDeep(p)), images, labels, **SMALL) for p in (1, 9)
    ]
    assert (results[0].losses - results[1].losses).abs().min() > 1e-6


def test_chunks_change_nothing():
    images, labels = batch()
    runs = []
    for chunk in (None, 1, 4, 100):
        model = small_model()
        result = pae.mpa_init(model, images, labels, **SMALL, chunk=chunk)
        runs.append((result.losses, result.selected, model.prompts.tokens.detach()))
    for losses, selected, tokens in runs[1:]:
        torch.testing.assert_close(losses, runs[0][0], rtol=1e-12, atol=1e-12)
        assert torch.equal(selected, runs[0][1])
        torch.testing.assert_close(tokens, runs[0][2], rtol=1e-12, atol=1e-12)


def test_equal_losses_are_taken_in_the_order_of_the_windows():
    """A blank batch: every window is empty, so all losses are equal, and no prompt is NaN."""
    images, labels = batch()
    model = small_model()
    result = pae.mpa_init(model, 0 * images, labels, **SMALL, chunk=1)
    assert (result.losses == result.losses[0]).all()
    assert result.selected.tolist() == [0, 1, 2]
    assert model.prompts.tokens.isfinite().all()


def test_a_backbone_of_16_bits_stays_one():
    images, labels = batch(dtype=torch.float32)
    model, half = small_model(torch.float32), small_model(torch.bfloat16)
    expected = pae.mpa_init(model, images, labels, **SMALL)
    result = pae.mpa_init(half, images.bfloat16(), labels, **SMALL)
    assert half.prompts.tokens.dtype == torch.bfloat16
    assert result.losses.dtype == torch.float32
    assert (result.losses - expected.losses).abs().max() < 0.1 * expected.losses.max()


# ---- economy


@pytest.mark.parametrize("stem", ["patch convolution", "padded"])
def test_one_transform_and_never_more_windows_than_a_chunk(stem, monkeypatch):
    transforms, sizes = [], []
    fft2 = torch.fft.fft2
    name = "shortcut_tokens" if stem == "patch convolution" else "shortcut_images"
    filtered = getattr(mpa_losses, name)

    def count_transforms(*args, **kwargs):
        transforms.append(1)
        return fft2(*args, **kwargs)

    def count_windows(*args):
        sizes.append(len(args[1]))
        return filtered(*args)

    monkeypatch.setattr(torch.fft, "fft2", count_transforms)
    monkeypatch.setattr(mpa_losses, name, count_windows)
    options = {} if stem == "patch convolution" else dict(BACKBONES["padded image size"])
    images, labels = batch(options.pop("images", (16, 16)))
    pae.mpa_init(small_model(**options), images, labels, **SMALL, chunk=2)
    windows = len(mpa.alignment._window_origins(images, **SMALL))
    assert len(transforms) == 1
    assert max(sizes) == 2
    assert sum(sizes) == windows + 3  # every window once, the chosen ones once more


def test_images_per_forward_follow_memory(monkeypatch):
    model = small_model(torch.float32)
    many = mpa_losses.images_per_forward(model, (16, 16))
    assert many > 9
    monkeypatch.setitem(mpa_losses._FORWARD_BYTES, "cpu", mpa_losses._FORWARD_BYTES["cpu"] // 4)
    assert mpa_losses.images_per_forward(model, (16, 16)) in (many // 4, many // 4 + 1)
    monkeypatch.setitem(mpa_losses._FORWARD_BYTES, "cpu", 1)
    assert mpa_losses.images_per_forward(model, (16, 16)) == 1


@pytest.mark.parametrize("room", [1, 2, 3, 7])
def test_small_forwards_change_nothing(room, monkeypatch):
    """A batch larger than a forward is split by images too."""
    images, labels = batch(count=5)
    expected = pae.mpa_init(small_model(), images, labels, **SMALL)
    seen = []
    rows = mpa_losses.FilteredBatch.rows

    def count_images(self, windows, images):
        seen.append(len(windows) * len(images))
        return rows(self, windows, images)

    monkeypatch.setattr(mpa_losses.FilteredBatch, "rows", count_images)
    monkeypatch.setattr(mpa_losses, "images_per_forward", lambda *_: room)
    result = pae.mpa_init(small_model(), images, labels, **SMALL)
    assert max(seen[:-3]) <= room and sum(seen[:-3]) == 9 * 5  # the last three are the prompts'
    torch.testing.assert_close(result.losses, expected.losses, rtol=1e-12, atol=1e-12)


def test_kld_is_not_computed(monkeypatch):
    def fail(*_):
        raise AssertionError("KLD was computed")

    model = small_model(kld=pae.KLD(dim=8))
    monkeypatch.setattr(pae.KLD, "terms", fail)
    pae.mpa_init(model, *batch(), **SMALL)


# ---- manners: reproducible, and nothing else is touched


def test_two_runs_agree_bit_for_bit():
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = small_model(torch.float32, prompts=VPTDeep(3, dropout=0.5)).train()
        images, labels = batch(dtype=torch.float32)
        result = pae.mpa_init(model, images, labels, **SMALL)
        runs.append((result.losses, result.selected, model.prompts.tokens))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_dropout_of_a_backbone_put_in_training_mode_is_off():
    options = {"pos_drop_rate": 0.5, "attn_drop_rate": 0.5, "proj_drop_rate": 0.5}
    expected = pae.mpa_init(small_model(), *batch(), **SMALL)
    model = small_model(**options)
    model.backbone.train()
    result = pae.mpa_init(model, *batch(), **SMALL)
    torch.testing.assert_close(result.losses, expected.losses)
    assert model.backbone.pos_drop.training


def random_states(generator):
    return (
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
        random.getstate(),
        generator.get_state().tolist(),
    )


@pytest.mark.parametrize("head", MPA_HEADS)
@pytest.mark.parametrize("family", [VPTDeep, VPTShallow])
def test_only_the_prompts_change(family, head):
    model = small_model(prompts=family(3, dropout=0.5)).train()
    model.head.eval()  # an unusual flag, to be kept as it is
    flags = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    own_head, tokens = model.head, model.prompts.tokens
    wanting = [p.requires_grad for p in model.parameters()]
    generator = torch.Generator().manual_seed(5)

    class Noisy(TensorDataset):
        """Augments with every source of randomness there is."""

        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            noise = torch.randn(()) + np.random.rand() + random.random()
            return image + noise, label

    loader = DataLoader(Noisy(*batch(count=8)), 4, shuffle=True, generator=generator)
    states = random_states(generator)
    pae.mpa_init(model, loader, **SMALL, head=head)

    assert random_states(generator) == states
    assert [module.training for module in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == wanting
    assert model.head is own_head and model.prompts.tokens is tokens
    changed = [n for n, v in model.state_dict().items() if not torch.equal(v, before[n])]
    assert changed == ["prompts.tokens"]
    assert all(p.grad is None for p in model.parameters())
    assert tokens.is_leaf


@pytest.mark.parametrize("head", MPA_HEADS)
def test_a_failure_leaves_the_model_as_it_was(head, monkeypatch):
    model = small_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    own_head = model.head
    flags = [module.training for module in model.modules()]

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(mpa_losses.WindowLosses, "_losses", fail)
    with pytest.raises(KeyboardInterrupt):
        pae.mpa_init(model, *batch(), **SMALL, head=head)
    assert model.head is own_head
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_autocast_around_it_changes_nothing():
    images, labels = batch(dtype=torch.float32)
    expected = pae.mpa_init(small_model(torch.float32), images, labels, **SMALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = pae.mpa_init(small_model(torch.float32), images, labels, **SMALL)
    assert torch.equal(result.losses, expected.losses)


def test_progress_goes_to_a_terminal_only(monkeypatch, capsys):
    pae.mpa_init(small_model(), *batch(), **SMALL)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes any stream for a terminal then
    pae.mpa_init(small_model(), *batch(), **SMALL)
    out, err = capsys.readouterr()
    assert out == "" and "MPA windows" in err
    pae.mpa_init(small_model(), *batch(), **SMALL, progress=False)
    assert capsys.readouterr() == ("", "")


def test_report_is_one_line_of_the_result():
    result = mpa.MPAResult(
        torch.tensor([3.0, 1.0, 2.0]), torch.zeros(3, 2), torch.tensor([1, 2]), 16, 8, "as_is"
    )
    assert result.report() == (
        "MPA: 2 of 3 windows (16 bins, stride 8, head as_is), losses 1.0000 to 2.0000, "
        "all 1.0000 to 3.0000"
    )


# ---- loaders


def test_the_first_batch_of_a_loader_is_taken():
    images, labels = batch(count=6)
    expected = pae.mpa_init(small_model(), images[:4], labels[:4], **SMALL)
    loaders = (
        DataLoader(TensorDataset(images, labels), batch_size=4),
        [(images[:4], labels[:4]), "never read"],
        iter([(images[:4], labels[:4], "file names")]),
    )
    for loader in loaders:
        result = pae.mpa_init(small_model(), loader, **SMALL)
        assert torch.equal(result.losses, expected.losses)


def test_labels_of_any_integer_type_and_images_of_another_precision():
    images, labels = batch()
    expected = pae.mpa_init(small_model(), images, labels, **SMALL)
    for dtype in (torch.int32, torch.uint8):
        result = pae.mpa_init(small_model(), images, labels.to(dtype), **SMALL)
        assert torch.equal(result.losses, expected.losses)
    result = pae.mpa_init(small_model(), images.float(), labels, **SMALL)
    torch.testing.assert_close(result.losses, expected.losses, rtol=1e-5, atol=1e-5)


# ---- the linear probe


def test_linear_probe_ranks_with_a_head_of_its_own():
    images, labels = batch(count=12)
    model = small_model()
    result = pae.mpa_init(model, images, labels, **SMALL, head="linear_probe")
    assert result.head == "linear_probe"

    zeros = [images.new_zeros(3, 24)] * 3
    with torch.no_grad():
        features = peers.prompted_logits(model.backbone, nn.Identity(), images, zeros, deep=True)
        probe = mpa.fit_probe(features, labels, 4)
    losses, _ = plain_losses(model, probe, images, labels)
    torch.testing.assert_close(result.losses, losses, rtol=1e-7, atol=1e-7)


def test_probe_separates_what_can_be_separated():
    generator = torch.Generator().manual_seed(6)
    centres = torch.randn(4, 24, generator=generator)
    labels = torch.arange(4).repeat(20)

    def draw():
        return centres[labels] + 0.3 * torch.randn(80, 24, generator=generator) + 5.0

    probe = mpa.fit_probe(draw(), labels, 4)
    with torch.no_grad():
        assert F.cross_entropy(probe(draw()), labels) < 0.1  # on images it was not fitted to


def test_probe_does_not_believe_noise():
    """Labels unrelated to the features, more features than images, and still no certainty."""
    generator = torch.Generator().manual_seed(7)
    features = torch.randn(40, 100, generator=generator)
    labels = torch.randint(4, (40,), generator=generator)
    probe = mpa.fit_probe(features, labels, 4)
    with torch.no_grad():
        unseen = F.cross_entropy(
            probe(torch.randn(400, 100, generator=generator)), labels.repeat(10)
        )
    assert unseen < 1.2 * torch.tensor(4.0).log()


def test_probe_minimises_the_loss_of_left_out_images(monkeypatch):
    """The closed form against refitting without each image in turn."""
    features, labels = torch.randn(12, 5, dtype=torch.float64), torch.arange(12) % 3
    tried = {}
    for ridge in mpa_probe.RIDGES:
        for scale in mpa_probe.SCALES:
            held_out = torch.stack(
                [_ridge_without(i, features, labels, 3, ridge) for i in range(12)]
            )
            tried[ridge, scale] = F.cross_entropy(scale * held_out, labels).item()
    ridge, scale = min(tried, key=tried.get)
    monkeypatch.setattr(mpa_probe, "RIDGES", (ridge,))
    monkeypatch.setattr(mpa_probe, "SCALES", (scale,))
    expected = mpa.fit_probe(features, labels, 3)
    monkeypatch.undo()
    assert torch.equal(mpa.fit_probe(features, labels, 3).weight, expected.weight)


def _ridge_without(i, features, labels, classes, ridge):
    """Prediction for image i of a ridge regression (free intercept) fitted to all others."""
    centred = features - features.mean(0)
    penalty = ridge * (centred @ centred.T).diagonal().mean()  # set by the whole batch
    keep = torch.arange(len(features)) != i
    x, y = features[keep], F.one_hot(labels[keep], classes).double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    gram = (x - mean_x).T @ (x - mean_x) + penalty * torch.eye(x.shape[1])
    weight = torch.linalg.solve(gram, (x - mean_x).T @ (y - mean_y))
    return (features[i] - mean_x) @ weight + mean_y


def test_probe_of_equal_features_predicts_the_shares():
    labels = torch.tensor([0, 0, 1, 0])
    probe = mpa.fit_probe(torch.ones(4, 3), labels, 2)
    with torch.no_grad():
        assert torch.equal(probe.weight, torch.zeros(2, 3))
        assert probe(torch.ones(1, 3)).argmax() == 0


# ---- bad input

IMAGES, LABELS = batch()
NAN = IMAGES.clone()
NAN[1, 0, 3, 3] = float("nan")


class Computed(VPTDeep):
    set_prompts = PromptFamily.set_prompts


class Adaptive(VPTDeep):
    depends_on_input = True


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": nn.Identity()}, TypeError, "model must be a PromptedViT, .* got Identity"),
        ({"prompts": VPTDeep([2, 3, 3])}, ValueError, r"model.prompts must have one .*\[2, 3, 3\]"),
        ({"prompts": VPTDeep(0)}, ValueError, "model.prompts has 0 prompts"),
        ({"prompts": VPTShallow(0)}, ValueError, "model.prompts has 0 prompts"),
        ({"prompts": Computed(2)}, ValueError, r"model.prompts \(Computed\) computes its prompts"),
        ({"prompts": Adaptive(2)}, ValueError, r"model.prompts \(Adaptive\) computes its prompts"),
        ({"prompts": VPTDeep(10)}, ValueError, "model.prompts has 10 prompts .* gives 9 windows"),
        ({"own_head": nn.Identity()}, ValueError, "model.head must be linear"),
        ({"window": 0}, ValueError, "window must be an integer of at least 1, got 0"),
        ({"window": 4.0}, ValueError, "window must be an integer of at least 1, got 4.0"),
        ({"window": 17}, ValueError, r"window must be at most min\(H, W\) = 16 .* got 17"),
        ({"stride": 0}, ValueError, "stride must be an integer of at least 1, got 0"),
        ({"stride": True}, ValueError, "stride must be an integer of at least 1, got True"),
        ({"chunk": 0}, ValueError, "chunk must be an integer of at least 1, got 0"),
        (
            {"head": "random"},
            ValueError,
            "head must be one of .*as_is.*linear_probe.* got 'random'",
        ),
        ({"images": 3}, TypeError, "images must be a tensor or a loader, got int"),
        ({"images": IMAGES[0]}, ValueError, "images must be"),
        ({"images": IMAGES[:, :1]}, ValueError, "images must have 3 channels, got 1"),
        ({"images": IMAGES[..., :12]}, ValueError, r"images must be \(16, 16\) .* got \(16, 12\)"),
        ({"images": IMAGES.int()}, ValueError, "images must be a float tensor"),
        ({"images": NAN}, ValueError, "images holds NaN or infinity in 1 of 3 images"),
        ({"images": NAN / 0}, ValueError, "images holds NaN or infinity in 3 of 3 images"),
        (
            {"images": IMAGES[:0], "labels": LABELS[:0]},
            ValueError,
            "images must be 1 or more for head 'as_is', got 0",
        ),
        ({"labels": None}, ValueError, "labels must be given when images is a tensor, got None"),
        ({"labels": LABELS.float()}, TypeError, "labels must be a tensor of integers.*float32"),
        ({"labels": LABELS == 1}, TypeError, "labels must be a tensor of integers.*bool"),
        ({"labels": [0, 1, 2]}, TypeError, "labels must be a tensor of integers.*got list"),
        ({"labels": LABELS[:2]}, ValueError, r"labels must be \(3,\) like images, got \(2,\)"),
        ({"labels": LABELS[:, None]}, ValueError, r"labels must be \(3,\) .* got \(3, 1\)"),
        ({"labels": LABELS + 4}, ValueError, r"labels must lie in \[0, 4\), got"),
        ({"labels": LABELS - 9}, ValueError, r"labels must lie in \[0, 4\), got -"),
        ({"images": [(IMAGES, LABELS)]}, ValueError, "labels must be None when images is a loader"),
        ({"images": [], "labels": None}, ValueError, "images is a loader without a batch"),
        ({"images": [IMAGES], "labels": None}, TypeError, "images must yield .* got Tensor"),
        ({"images": [{"x": 1}], "labels": None}, TypeError, "images must yield .* got dict"),
        ({"images": [(IMAGES.numpy(), LABELS)], "labels": None}, ValueError, "images must be a"),
        (
            {"images": IMAGES[:1], "labels": LABELS[:1], "head": "linear_probe"},
            ValueError,
            "images must be 2 or more for head 'linear_probe', got 1",
        ),
    ],
)
def test_bad_input_is_named_in_one_line(change, error, message):
    change = dict(change)
    prompts, own_head = change.pop("prompts", None), change.pop("own_head", None)
    model = change.pop("model", None) or small_model(prompts=prompts, num_classes=4)
    if own_head is not None:
        model.head = own_head
    arguments = {"images": IMAGES, "labels": LABELS, **SMALL, **change}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message) as caught:
        pae.mpa_init(model, **arguments)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_model_that_overflows_is_named():
    model = small_model(torch.float32)
    with torch.no_grad():
        model.head.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="model gives no finite loss for 9 of 9 windows"):
        pae.mpa_init(model, *batch(dtype=torch.float32), **SMALL)
