"""From image files to batches: geometry, caches, random crops, shares of processes."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

import pae
from pae.train import pixels
from pae.train.cli import main
from pae.train.data import Images
from pae.train.images import Ranges
from tests.train.helpers import BACKBONE_FLAGS, CPU_FLAGS


def picture(seed, size=(12, 10)):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))


def save_pictures(folder, count):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture(i).save(folder / f"{i:03d}.png")


def pixel_split(tmp_path, count=6, augment="none", training=True, **options):
    save_pictures(tmp_path / "p", count)
    images = Images(sorted((tmp_path / "p").iterdir()), [i % 3 for i in range(count)])
    transform, is_random = pixels.make_transform(augment, training, 8, "bicubic")
    return pixels.PixelSplit(images, transform, is_random, **options)


def test_batches_are_the_normalised_squashed_images(tmp_path):
    split = pixel_split(tmp_path)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.125)
    pipeline = pixels.Pipeline(split, mean, std, "cpu")
    ((images, labels),) = pipeline.batches([torch.tensor([4, 1])])
    for row, index in enumerate((4, 1)):
        small = picture(index).resize((8, 8), Image.Resampling.BICUBIC)
        expected = (np.asarray(small, np.float32) / 255 - mean) / std
        torch.testing.assert_close(
            images[row], torch.from_numpy(expected).float().permute(2, 0, 1), atol=1e-5, rtol=0
        )
    assert labels.tolist() == [1, 1]


def test_kept_pixels_equal_decoding_every_time(tmp_path):
    kept = pixel_split(tmp_path)
    assert kept.pixels is not None
    decoded = pixels.PixelSplit(kept.images, kept.transform, cache_bytes=0)
    assert decoded.pixels is None
    order = torch.tensor([3, 0, 5])
    for a, b in zip(kept.__getitems__(order), decoded.__getitems__(order)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("augment", ["crop", "timm"])
def test_random_crops_depend_on_seed_epoch_and_image_alone(tmp_path, augment):
    split = pixel_split(tmp_path, augment=augment, seed=3)
    pipeline = pixels.Pipeline(split, (0, 0, 0), (1, 1, 1), "cpu")

    def draw(epoch, lists):
        batches = list(pipeline.batches(lists, epoch))
        return torch.cat([images for images, _ in batches])

    whole = draw(1, [torch.arange(6)])
    torch.rand(7)
    random.random()
    states = torch.get_rng_state(), random.getstate()
    pieces = draw(1, [torch.tensor([0, 1, 2, 3]), torch.tensor([4, 5])])
    assert torch.equal(whole, pieces)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert not torch.equal(whole, draw(2, [torch.arange(6)]))


def test_evaluation_transforms_are_never_random(tmp_path):
    for augment in pixels.AUGMENTS:
        assert not pixels.make_transform(augment, False, 8, "bicubic")[1]
    with pytest.raises(ValueError, match=r"--augment blur"):
        pixels.make_transform("blur", True, 8, "bicubic")


def truncated(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def split_of(folder, augment):
    images = Images(sorted(folder.iterdir()), [0] * len(list(folder.iterdir())))
    return pixels.PixelSplit(images, *pixels.make_transform(augment, True, 8, "bicubic"))


def test_unreadable_images_of_a_kept_split_are_named_at_once(tmp_path):
    save_pictures(tmp_path, 5)
    for number in (1, 3, 4):
        truncated(tmp_path / f"00{number}.png")
    with pytest.raises(ValueError, match=r"unreadable image .*001.png: .*and 2 more of 5 images"):
        split_of(tmp_path, "none")


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_that_is_drawn_is_one_line_from_every_process(tmp_path, workers):
    save_pictures(tmp_path, 6)
    truncated(tmp_path / "004.png")
    pipeline = pixels.Pipeline(split_of(tmp_path, "crop"), (0,) * 3, (1,) * 3, "cpu", workers)
    batches = pipeline.batches([torch.tensor(pair) for pair in ((0, 1), (2, 3), (4, 5))])
    assert next(batches)[0].shape == next(batches)[0].shape == (2, 3, 8, 8)
    with pytest.raises(ValueError) as caught:
        next(batches)
    start = f"unreadable image {tmp_path / '004.png'}: "
    assert str(caught.value).startswith(start) and len(str(caught.value)) < len(start) + 80


def test_a_line_of_pixels_is_named(tmp_path, monkeypatch):
    Image.new("RGB", (1, 30)).save(tmp_path / "line.png")

    def resize(*_):
        raise MemoryError

    monkeypatch.setattr(pixels, "make_transform", lambda *_: (resize, True))
    with pytest.raises(ValueError, match=r"line.png: 1 x 30 pixels cannot be .*MemoryError"):
        split_of(tmp_path, "crop").__getitems__(torch.tensor([0]))


def test_arrays_of_another_kind_are_refused():
    images = Images(np.zeros((3, 8, 8), np.float32), [0, 1, 0])
    with pytest.raises(ValueError, match=r"float32 \(8, 8\), expected uint8 .*2 more of 3"):
        pixels.PixelSplit(images, *pixels.make_transform("none", True, 8, "bicubic"))


def test_deep_images_of_a_split_are_scaled_together(tmp_path):
    for i, top in enumerate((60000, 4000)):
        Image.fromarray(np.full((8, 8), top, np.uint16)).save(tmp_path / f"{i}.png")
    with pytest.warns(UserWarning, match=r"0 is black, 65535 white \(2 of 2 images"):
        split = split_of(tmp_path, "none")
    assert [int(image.max()) for image in split.pixels] == [233, 16]


# ---- geometry


def squares(width, height):
    """An image whose red is the column and green the row, in parts of 255."""
    x = np.tile(np.linspace(0, 255, width), (height, 1))
    y = np.tile(np.linspace(0, 255, height)[:, None], (1, width))
    return Image.fromarray(np.stack([x, y, 0 * x], 2).round().astype(np.uint8))


@pytest.mark.parametrize("size", [32, 98, 112, 224, 384, 448])
def test_crops_show_the_same_scale_in_training_and_evaluation(size):
    """VPT: the short side to 256 of 224 (438 of 384, 512 of 448), aspect kept."""
    image = squares(4 * size, 2 * size)
    resized = {224: 256, 384: 438, 448: 512}.get(size, int(size * 256 / 224))
    steps = []
    for training in (True, False):
        transform, is_random = pixels.make_transform("crop", training, size, "bicubic")
        assert is_random == training
        torch.manual_seed(0)
        got = transform(image).float()
        assert got.shape == (3, size, size)
        steps.append([(got[0, :, -1] - got[0, :, 0]).abs(), (got[1, -1] - got[1, 0]).abs()])
    for across, down in steps:
        for step, whole, source in (
            (across, 2 * resized, image.width),
            (down, resized, image.height),
        ):
            expected = 255 * (size - 1) * source / whole / (source - 1)
            assert (step - expected).abs().max() <= 2


def test_timm_evaluates_by_the_crop_of_the_model():
    image = squares(100, 100)
    shares = []
    for config in (
        None,
        {"crop_pct": 1.0, "crop_mode": "center"},
        {"crop_pct": 0.5, "crop_mode": "center"},
    ):
        got = pixels.make_transform("timm", False, 32, "bicubic", config)[0](image).float()
        shares.append(float(got[0, 0, -1] - got[0, 0, 0]) / 255)
    assert shares == pytest.approx([0.875, 1, 0.5], abs=0.05)


def test_every_transform_takes_every_decoded_image(tmp_path):
    array = np.arange(0, 60000, 400, dtype=np.uint16).reshape(10, 15)
    Image.fromarray(array).save(tmp_path / "deep.png")
    image = Image.fromarray((array // 256).astype(np.uint8)).convert("P")
    image.save(tmp_path / "palette.png", transparency=3)
    Image.fromarray(array > 9000).save(tmp_path / "bits.png")
    for path in tmp_path.iterdir():
        for augment in pixels.AUGMENTS:
            for training in (True, False):
                transform, is_random = pixels.make_transform(augment, training, 8, "bicubic")
                images = Images([path], [0])
                split = pixels.PixelSplit(images, transform, is_random, ranges=Ranges(65535))
                got = split.__getitems__(torch.tensor([0]))[0]
                assert got.shape == (1, 3, 8, 8) and got.dtype == torch.uint8 and got.max() > 0


# ---- normalisation and order


def test_normalisation_is_explicit():
    config = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    assert pixels.normalisation("model", config) == (config["mean"], config["std"])
    assert pixels.normalisation("inception", config)[0] == (0.5, 0.5, 0.5)
    assert pixels.normalisation("none", config)[1] == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"--norm zscore"):
        pixels.normalisation("zscore", config)


def test_an_epoch_visits_every_image_once_in_another_order():
    first, second = (torch.cat(pixels.epoch_batches(23, 5, 0, e)) for e in (0, 1))
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(23))
    assert not torch.equal(first, second)
    assert [len(batch) for batch in pixels.epoch_batches(23, 5, 0, 0)] == [5, 5, 5, 5, 3]


@pytest.mark.parametrize("size, world", [(8, 2), (7, 2), (1, 2), (3, 4)])
def test_weighted_mean_over_processes_is_the_mean_over_the_batch(size, world):
    losses = torch.rand(size, dtype=torch.float64)
    total = 0
    for rank in range(world):
        indices, weight = pixels.share(torch.arange(size), rank, world)
        assert len(indices) >= 1
        total += weight * losses[indices].mean() / world
    torch.testing.assert_close(total, losses.mean())


def test_a_run_on_deep_images_says_so_and_keeps_their_range(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for name, level in (("dark", 500), ("light", 3000)):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                array = rng.normal(level, 100, (32, 32)).clip(0, 4095).astype(np.uint16)
                Image.fromarray(array).save(tmp_path / "data" / split / name / f"{i}.png")
    recipe = ["--method", "compare", "--epochs", "1", "--batch-size", "4", "--num-tokens", "1"]
    parts = ["--kld-dim", "8", "--mpa-window", "8", "--mpa-stride", "8", "--mpa-images", "1"]
    flags = ["--data", str(tmp_path / "data"), *BACKBONE_FLAGS, *CPU_FLAGS, *recipe, *parts]
    assert main(["train", *flags, "--output", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if "0 is black, 4095 white (12 of 12 images" in line]) == 1
    task = pae.read_checkpoint(tmp_path / "run" / "vpt-deep" / "best.safetensors").task
    assert task.integer_white == 4095 and task.real_white is None
    assert "integer_white" not in task.transform()
    (tmp_path / "data" / "val" / "light" / "0.png").write_bytes(b"<html>")
    assert main(["train", *flags, "--output", str(tmp_path / "other")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pae: error: unreadable image") and "0.png: it is a web page" in line
    assert not (tmp_path / "other").exists()
