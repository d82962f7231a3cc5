"""MPA's forwards: zero prompts as one key, tokens from the spectrum, devices and ranks."""

import sys

import pytest
import torch
from torch.nn import functional as F

import pae
from pae.mpa import forward as mpa_forward
from pae.mpa import losses as mpa_losses
from pae.mpa.forward import ZeroPromptForward
from pae.mpa.losses import FilteredBatch
from pae.packs import can_pack
from pae_kernels.spectrum.reference import band_pass
from tests import processes, tiny
from tests.tiny import error

WINDOW = {"window": 6, "stride": 5}  # 9 windows in 16 x 16


def zero_prompted(feature, count, family=pae.prompts.VPTDeep, dtype=torch.float64, **changes):
    model = tiny.prompted(feature, family(count), dtype, **changes).eval()
    with torch.no_grad():
        for p in model.prompts.parameters():
            p.zero_()
    return model


def batch(model, count=4):
    images = tiny.images(model.backbone, count)
    return images, torch.arange(count) % model.num_classes


# ---- zero prompts


@pytest.mark.parametrize("count", [1, 7, 50])
@pytest.mark.parametrize(
    "feature", ["plain", "avg", "qk_norm", "one_block", "map", "layer_scale", "clip", "no_qkv_bias"]
)
def test_zero_prompts_are_one_key(feature, count):
    model = zero_prompted(feature, count)
    images, _ = batch(model)
    with torch.no_grad():
        expected = model(images)
        got = ZeroPromptForward(model, count, torch.float64)(model.view.embed(images))
    assert error(got, expected) < 1e-12


@pytest.mark.parametrize("family", [pae.prompts.VPTDeep, pae.prompts.VPTShallow])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_way_of_other_devices_is_the_same(family, dtype, monkeypatch):
    """There the key goes through `prompt_attention`."""
    model = zero_prompted("plain", 7, family)
    images, _ = batch(model)
    results = []
    for here in (True, False):
        monkeypatch.setattr(mpa_forward, "_has_flash_with_lse", lambda rows, here=here: here)
        with torch.no_grad():
            results.append(ZeroPromptForward(model, 7, dtype)(model.view.embed(images)))
    assert error(results[1], results[0]) < (1e-12 if dtype == torch.float64 else 2e-2)


@pytest.mark.parametrize("feature", ["plain", "avg", "qk_norm", "registers"])
def test_zero_prompts_that_live_on_are_rows(feature):
    model = zero_prompted(feature, 7, pae.prompts.VPTShallow)
    images, _ = batch(model)
    with torch.no_grad():
        expected = model(images)
        got = ZeroPromptForward(model, 7, torch.float64)(model.view.embed(images))
    assert error(got, expected) < 1e-12


@pytest.mark.parametrize("feature", ["plain", "avg", "qk_norm", "clip"])
def test_weights_laid_out_for_one_size_serve_all(feature):
    """Forwards of the size that was announced, and of others, equal those without an order."""
    model = zero_prompted(feature, 5, dtype=torch.float32)
    images, _ = batch(model, 6)
    plain = ZeroPromptForward(model, 5, torch.float32)
    laid_out = ZeroPromptForward(model, 5, torch.float32)
    with torch.no_grad():
        x = model.view.embed(images)
        for rows, times in ((x[:4].shape[:2].numel(), 100), (x.shape[:2].numel(), 100), (8, 1)):
            laid_out.expect(rows, times)
            for size in (4, 6):
                assert error(laid_out(x[:size].clone()), plain(x[:size].clone())) < 1e-5
    if can_pack(x) and feature != "qk_norm":
        rows = x[:4].shape[:2].numel()
        laid_out.expect(rows, -(-mpa_forward._WORTH_PACKING // rows))
        laid_out(x[:4].clone())
        assert len(laid_out._steps[0]._packs) == 4
    laid_out.expect(64, mpa_forward._WORTH_PACKING // 64 - 1)
    assert not laid_out._steps[0]._packs


@pytest.mark.parametrize("feature", ["plain", "avg"])
def test_bf16_products_are_as_good_as_those_of_the_engine(feature):
    """By the 2x rule: error against fp64 at most twice that of the engine under autocast."""
    truth = zero_prompted(feature, 5)
    images, _ = batch(truth, 8)
    model = zero_prompted(feature, 5, dtype=torch.float32)
    with torch.no_grad():
        expected = truth(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            engine = pae.fast_forward(model, images.float())
        forward = ZeroPromptForward(model, 5, torch.bfloat16)
        got = forward(model.view.embed(images.float()))
    assert got.dtype == torch.float32
    assert 1e-5 < error(got, expected) < 2 * error(engine, expected)


# ---- rows from the spectrum

STEMS = ["plain", "registers", "no_embed_class", "not_square", "oblong_patch", "large_patch"]
STEMS += ["grey", "dynamic_size", "clip", "registers_no_class_token"]


@pytest.mark.parametrize("feature", STEMS)
def test_rows_of_filtered_images_without_the_images(feature):
    model = zero_prompted(feature, 2)
    images, _ = batch(model)
    size = tuple(images.shape[-2:])
    assert model.view.patch_convolution(size) is not None
    origins = torch.tensor([[0, 0], [1, 2], [size[0] - 5, size[1] - 5]])
    rows = FilteredBatch(model, torch.fft.fft2(images), origins, 5)
    with torch.no_grad():
        for windows, some in (([2, 0], [0, 1, 2, 3]), ([1], [3, 1]), ([0, 1], [3, 2, 1, 0])):
            windows, some = torch.tensor(windows), torch.tensor(some)
            expected = torch.cat(
                [
                    model.view.embed(band_pass(images[some], tuple(origins[w].tolist()), 5))
                    for w in windows
                ]
            )
            assert error(rows.rows(windows, some), expected) < 1e-12


class Shifted(torch.nn.Conv2d):
    """A convolution with something more to it."""

    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize("stem", ["overlap", "dilated", "subclass", "padded", "not tiled"])
def test_other_stems_get_images(stem):
    model = zero_prompted("dynamic_size" if stem in ("padded", "not tiled") else "plain", 2)
    embed, size = model.backbone.patch_embed, (16, 16)
    proj = embed.proj
    arguments = (proj.in_channels, proj.out_channels)
    if stem == "overlap":
        embed.proj = torch.nn.Conv2d(*arguments, 8, stride=4, padding=2)
    elif stem == "dilated":
        embed.proj = torch.nn.Conv2d(*arguments, 4, stride=4, dilation=2, padding=2)
    elif stem == "subclass":
        embed.proj = Shifted(*arguments, 4, stride=4)
    elif stem == "padded":
        embed.proj = torch.nn.Conv2d(*arguments, 4, stride=4, padding=1)
    else:
        size = (16, 18)
    assert model.view.patch_convolution(size) is None


# ---- devices and ranks


def found(model, images, labels, **options):
    result = pae.mpa_init(model, images, labels, **WINDOW, progress=False, **options)
    return result, [p.detach().clone() for p in model.prompts.parameters()]


@pytest.mark.parametrize("search", ["exact", pae.mpa.Halving(first=4)])
def test_devices_share_the_windows(search, monkeypatch):
    """Bit for bit what one device finds; each device but the model's has a copy of its own."""
    runs, copies = [], []
    deepcopy = mpa_losses.copy.deepcopy
    monkeypatch.setattr(
        mpa_losses.copy, "deepcopy", lambda model: copies.append(model) or deepcopy(model)
    )
    for devices in (None, ["cpu"], ["cpu", torch.device("cpu")], ["cpu:0", "cpu", "cpu:0"]):
        model = zero_prompted("plain", 3, dtype=torch.float32)
        images, labels = batch(model, 9)
        result, prompts = found(model, images, labels, chunk=2, devices=devices, search=search)
        runs.append((result.losses, result.selected, *prompts))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
    assert len(copies) == 2  # torch tells cpu:0 from cpu


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ("cuda:0", "devices must be None, 'ranks' or a list of devices, got 'cuda:0'"),
        ([], r"devices must be None, 'ranks' or a list of devices, got \[\]"),
        (2, "devices must be None, 'ranks' or a list of devices, got 2"),
        (["warp"], r"devices must name devices, got \['warp'\]"),
    ],
)
def test_bad_devices_are_named(devices, message):
    model = zero_prompted("plain", 3, dtype=torch.float32)
    with pytest.raises(ValueError, match=message) as caught:
        found(model, *batch(model), devices=devices)
    assert "\n" not in str(caught.value)


def test_ranks_without_a_process_group_are_this_process():
    model = zero_prompted("plain", 3, dtype=torch.float32)
    images, labels = batch(model)
    expected, prompts = found(model, images, labels)
    result, same = found(model, images, labels, devices="ranks")
    assert torch.equal(result.losses, expected.losses)
    assert all(torch.equal(a, b) for a, b in zip(same, prompts, strict=True))


RANKS = """
import sys
import torch, torch.distributed as dist, torch.multiprocessing as mp
import pae
from tests import tiny

def work(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    images, labels = tiny.images(tiny.backbone(), 12).float(), torch.arange(12) % 5
    cases = [{}, {"search": pae.mpa.Halving(first=4)}, {"precision": "bf16"}]
    cases += [{"head": "linear_probe"}]
    for options in cases:
        options = {"window": 6, "stride": 5, "chunk": 2, "progress": False, **options}
        alone = tiny.prompted("plain", 3, torch.float32)
        expected = pae.mpa_init(alone, images, labels, **options)
        shared = tiny.prompted("plain", 3, torch.float32)
        if rank == 1:  # the first rank's batch and head decide
            images, labels = images.flip(0), labels.flip(0)
            torch.nn.init.normal_(shared.head.weight)
        own_head = shared.head.weight.clone()
        result = pae.mpa_init(shared, images, labels, **options, devices="ranks")
        if rank == 1:
            images, labels = images.flip(0), labels.flip(0)
        assert torch.equal(result.losses, expected.losses), options
        assert torch.equal(result.selected, expected.selected), options
        assert torch.equal(shared.prompts.tokens, alone.prompts.tokens), options
        assert torch.equal(shared.head.weight, own_head)
    if rank == 1:
        with torch.no_grad():
            shared.backbone.blocks[1].mlp.fc1.weight.mul_(1.01)
    try:
        pae.mpa_init(shared, images, labels, **options, devices="ranks")
    except ValueError as error:
        assert "the same backbone, settings and batch shape on every rank" in str(error)
    else:
        raise AssertionError("different backbones went unnoticed")
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.start_processes(work, (sys.argv[1],), nprocs=2, start_method="fork")
    print("equal")
"""


def test_two_ranks_find_what_one_finds(tmp_path):
    """Bit for bit, in every search and precision; and the windows are really shared."""
    done = processes.run([sys.executable, "-c", RANKS, str(tmp_path / "store")])
    assert done.stdout.strip() == "equal"


def test_each_rank_runs_its_share(monkeypatch):
    """Rank r of n runs forwards r, r + n, ...; the sum of all tables is the table of one rank."""
    model = zero_prompted("plain", 3, dtype=torch.float32)
    images, labels = batch(model)
    tables, ran = [], []
    worker = mpa_losses._Worker.losses

    def count(self, windows, images, *rest):
        ran[-1].append(windows.tolist())
        return worker(self, windows, images, *rest)

    monkeypatch.setattr(mpa_losses._Worker, "losses", count)
    origins = torch.cartesian_prod(torch.arange(0, 11, 5), torch.arange(0, 11, 5))
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        ran.append([])
        ranks = mpa_losses.Ranks(False, torch.device("cpu"))
        ranks.rank, ranks.world = rank, world
        monkeypatch.setattr(ranks, "sum", lambda t: t)
        losses = mpa_losses.WindowLosses(
            model,
            torch.fft.fft2(images),
            labels,
            origins,
            6,
            3,
            ranks,
            [torch.device("cpu")],
            2,
            lambda n: None,
        )
        with torch.no_grad():
            tables.append(losses.in_dtype(torch.float32)(torch.arange(9), torch.arange(4)))
    assert torch.equal(tables[1] + tables[2], tables[0])
    assert ran[0] == [[0, 1], [2, 3], [4, 5], [6, 7], [8]]
    assert ran[1] == ran[0][::2] and ran[2] == ran[0][1::2]


# ---- searches and precisions of a model


@pytest.mark.parametrize(
    "options",
    [
        {"search": "halving"},
        {"search": pae.mpa.Halving(first=24)},  # one stage: the exact search in another order
        {"search": pae.mpa.Halving(first=4, seed=3), "precision": "bf16"},
        {"precision": "bf16"},
        {},
    ],
)
def test_every_way_finds_the_exact_selection(options):
    model = zero_prompted("plain", 3, dtype=torch.float32)
    images, labels = batch(model, 24)
    expected, prompts = found(model, images, labels)
    result, same = found(model, images, labels, **options)
    assert torch.equal(result.selected, expected.selected)
    torch.testing.assert_close(result.losses[result.selected], expected.losses[expected.selected])
    assert all(torch.equal(a, b) for a, b in zip(same, prompts, strict=True))
    assert (result.images_seen is None) == ("search" not in options)
    assert (result.near_ties is None) == ("precision" not in options)
    assert expected.near_ties is None and expected.images_seen is None


def test_bf16_losses_are_rounded_and_those_of_the_selection_are_not():
    model = zero_prompted("plain", 1, dtype=torch.float32)
    images, labels = batch(model, 6)
    options = {"window": 3, "stride": 2}
    exact = pae.mpa_init(model, images, labels, **options)
    result = pae.mpa_init(model, images, labels, **options, precision="bf16")
    again = result.near_ties.rechecked
    torch.testing.assert_close(result.losses[again], exact.losses[again], rtol=1e-6, atol=1e-6)
    rounded = torch.ones(len(exact.losses), dtype=torch.bool)
    rounded[again] = False
    assert rounded.any()
    error = (result.losses - exact.losses)[rounded].abs()
    assert 1e-5 < error.max() < 0.1


def test_reports_say_what_was_saved():
    model = zero_prompted("plain", 3, dtype=torch.float32)
    images, labels = batch(model, 16)
    halving, _ = found(model, images, labels, search="halving")
    share = 100 * halving.images_seen.sum() / (9 * 16)
    assert halving.report().endswith(f"; halving ran {share:.0f} % of the forwards")
    rounded, _ = found(model, images, labels, precision="bf16")
    ties = rounded.near_ties
    assert rounded.report().endswith(
        f"; bf16, {len(ties.rechecked)} checked, {len(ties.added)} swapped"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"search": "random"}, r"search must be one of \('exact', 'halving'\), got 'random'"),
        ({"search": None}, r"search must be one of \('exact', 'halving'\), got None"),
        ({"precision": "fp8"}, r"precision must be one of \('exact', 'bf16'\), got 'fp8'"),
    ],
)
def test_bad_choices_are_named(change, message):
    model = zero_prompted("plain", 3, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        found(model, *batch(model), **change)


def test_the_loss_is_the_cross_entropy_of_the_filtered_batch():
    """From the definition alone: filter, reference forward, mean cross-entropy."""
    model = zero_prompted("plain", 4)
    images, labels = batch(model, 5)
    result = pae.mpa_init(model, images, labels, **WINDOW)
    with torch.no_grad():
        for p in model.prompts.parameters():
            p.zero_()
        for window, origin in enumerate(result.origins.tolist()):
            expected = F.cross_entropy(model(band_pass(images, tuple(origin), 6)), labels)
            assert abs(result.losses[window] - expected) < 1e-12
