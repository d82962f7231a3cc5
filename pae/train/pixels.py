"""From images to batches of normalised tensors; timm owns the geometry and the constants.

`pae.train.images` decodes files; here a split becomes uint8. When its transform is deterministic
and it fits in `CACHE_BYTES` it is decoded once and kept, so that an epoch costs no decoding; random
transforms run per epoch, seeded by (seed, epoch, image), so that a resumed run sees the very same
crops.
"""

from __future__ import annotations

import math
import random
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pae.choices import AUGMENTS, LEGACY, NORMS
from pae.train.clips import read_frames
from pae.train.data import Images
from pae.train.images import Ranges, decode, map_images, survey
from pae.train.resize import LegacyBilinear

CACHE_BYTES = 2 << 30
Transform = Callable[[Any], Tensor]  # of a PIL image


def normalisation(
    norm: str, model_config: Mapping[str, Any]
) -> tuple[Sequence[float], Sequence[float]]:
    """(mean, std) per channel on the 0..1 scale.

    Args:
        norm: "model" (what the backbone was trained with), "imagenet", "inception" (0.5 / 0.5) or
            "none" (0 / 1).
        model_config: timm's resolved data configuration of the backbone; None where it has no mean.
    Raises:
        ValueError: unknown name, or "model" where that is not known.
    """
    from timm.data import constants

    table = {
        "model": (model_config["mean"], model_config["std"]),
        "imagenet": (constants.IMAGENET_DEFAULT_MEAN, constants.IMAGENET_DEFAULT_STD),
        "inception": (constants.IMAGENET_INCEPTION_MEAN, constants.IMAGENET_INCEPTION_STD),
        "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    }
    if norm not in table:
        raise ValueError(f"--norm {norm}: expected one of {', '.join(NORMS)}")
    if table[norm][0] is None:
        raise ValueError(
            f"norm {norm}: the model does not say how its images are normalised (it has no "
            "preprocessor_config.json); give --norm imagenet, inception or none"
        )
    return table[norm]


def evaluation_crop(augment: str, model_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """How evaluation crops, as timm's `crop_pct` and `crop_mode`; arguments as `make_transform`'s.

    Raises:
        ValueError: unknown `augment`.
    """
    if augment not in AUGMENTS:
        raise ValueError(f"--augment {augment}: expected one of {', '.join(AUGMENTS)}")
    if augment == "none":
        return {"crop_pct": 1.0, "crop_mode": "squash"}
    found = {"crop_pct": 0.875, "crop_mode": "center"}
    if augment == "timm" and model_config is not None:
        return {name: model_config[name] for name in found}
    return found


def make_transform(
    augment: str,
    training: bool,
    image_size: int,
    interpolation: str,
    model_config: Mapping[str, Any] | None = None,
    rand_augment: str | None = None,
) -> tuple[Transform, bool]:
    """A transform PIL -> tensor (3, S, S) on the scale 0 .. 255, and whether it is random; uint8,
    but for "tf1-bilinear", which does not round.

    Args:
        augment: "none" squashes the image to S x S (the VTAB protocol, training and evaluation
            alike); "crop" resizes the short side to S * 256 / 224 and takes a random crop and flip
            in training, the centre in evaluation (VPT's FGVC protocol); "timm" is timm's random
            resized crop, flip and colour jitter in training, its crop for the model in evaluation.
        training: training or evaluation.
        image_size: S.
        interpolation: PIL interpolation by name, e.g. "bicubic"; or "tf1-bilinear"
            (`pae.train.resize`), with "none".
        model_config: timm's resolved data configuration of the backbone; for "timm" in evaluation
            its "crop_pct" and "crop_mode", without it 0.875 and "center".
        rand_augment: RandAugment in timm's words, for training; after crop and flip, and with
            "timm" in place of the jitter.
    Raises:
        ValueError: unknown `augment`, or one that does not go with the interpolation.
    """
    from timm.data import create_transform
    from timm.data.transforms import MaybePILToTensor, str_to_interp_mode
    from torchvision import transforms

    if interpolation == LEGACY:
        if augment != "none" or rand_augment is not None:
            raise ValueError(f"interpolation {LEGACY} needs augment none, got {augment}")
        return LegacyBilinear((image_size, image_size)), False
    # use_prefetcher leaves the result in uint8: it is normalised on the device, per batch
    common: dict[str, Any] = {
        "input_size": image_size,
        "interpolation": interpolation,
        "use_prefetcher": True,
    }
    crop = evaluation_crop(augment, model_config)
    if not training or (augment == "none" and rand_augment is None):
        return create_transform(**common, **crop), False
    if augment == "timm":
        return create_transform(**common, is_training=True, auto_augment=rand_augment), True
    if augment == "none":
        steps = create_transform(**common, **crop).transforms
    else:
        short_side = math.floor(image_size / crop["crop_pct"])  # as timm computes it to evaluate
        steps = [
            transforms.Resize(short_side, str_to_interp_mode(interpolation)),
            transforms.RandomCrop(image_size),
            transforms.RandomHorizontalFlip(),
            MaybePILToTensor(),
        ]
    if rand_augment is not None:  # while the image is PIL's
        steps = [*steps[:-1], _rand_augment(rand_augment, image_size, interpolation), steps[-1]]
    return transforms.Compose(steps), True


def _rand_augment(config: str, image_size: int, interpolation: str) -> Any:
    """timm's RandAugment, with the constants that its own training transform gives it."""
    from timm.data.auto_augment import rand_augment_transform
    from timm.data.constants import IMAGENET_DEFAULT_MEAN
    from timm.data.transforms import str_to_pil_interp

    constants = {
        "translate_const": int(image_size * 0.45),
        "img_mean": tuple(min(255, round(255 * value)) for value in IMAGENET_DEFAULT_MEAN),
        "interpolation": str_to_pil_interp(interpolation),
    }
    return rand_augment_transform(config, constants)


class PixelSplit(Dataset):
    """uint8 pixels and labels of one split; index lists in, ((B, 3, S, S), (B,)) out, of clips
    ((B, T, 3, S, S), (B,)).

    Args:
        images: a `pae.train.data.Images`.
        transform: PIL -> tensor on the scale 0 .. 255; the cache keeps its dtype.
        is_random: whether `transform` draws random numbers.
        seed: seed of those numbers.
        workers: threads that fill the cache.
        cache_bytes: largest split kept decoded.
        ranges: what `pae.train.images.survey` found in all splits of the dataset; by default this
            split is a dataset of its own.
        frames: T of clips, whose frames are all drawn alike; None for images.
    Raises:
        ValueError: an image is unreadable; where a split is not kept decoded, this is found when
            it is drawn, except for what its header says.
    """

    def __init__(
        self,
        images: Images,
        transform: Transform,
        is_random: bool = False,
        seed: int = 0,
        workers: int = 2,
        cache_bytes: int | None = None,
        ranges: Ranges | None = None,
        frames: int | None = None,
    ) -> None:
        from PIL import Image

        self.images, self.frames = images, frames
        self.transform = transform
        self.is_random = is_random
        self.seed = seed
        self.epoch = 0
        self.labels = torch.tensor(images.labels, dtype=torch.long)
        self.pixels: Tensor | None = None
        self.ranges = survey(images.items, workers) if ranges is None else ranges
        if is_random:
            return
        sample = transform(Image.new("RGB", (8, 8)))
        times = 1 if frames is None else frames
        room = CACHE_BYTES if cache_bytes is None else cache_bytes
        if len(images) * times * sample.nbytes <= room:
            shape = sample.shape if frames is None else (frames, *sample.shape)
            self.pixels = torch.empty((len(images), *shape), dtype=sample.dtype)
            decoded = map_images(self._decode, range(len(images)), workers)
            for i, pixels in enumerate(decoded):
                self.pixels[i] = pixels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        if self.pixels is not None:
            return self.pixels[indices], self.labels[indices]
        return torch.stack([self._draw(int(i)) for i in indices]), self.labels[indices]

    def _draw(self, index: int) -> Tensor:
        if not self.is_random:
            return self._decode(index)
        # the global streams belong to the model (dropout): borrow them, hand them back untouched
        python_state, torch_state = random.getstate(), torch.get_rng_state()
        numpy_state = np.random.get_state()  # RandAugment chooses by it
        try:
            return self._decode(index, hash((self.seed, self.epoch, index)))
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            torch.set_rng_state(torch_state)

    def _decode(self, index: int, key: int | None = None) -> Tensor:
        item = self.images.items[index]
        if self.frames is None:
            return self._transformed(decode(item, self.ranges), index, key)
        drawn = [decode(frame, self.ranges) for frame in read_frames(item, self.frames)]
        return torch.stack([self._transformed(frame, index, key) for frame in drawn])

    def _transformed(self, image: Any, index: int, key: int | None) -> Tensor:
        """`key`: of the random numbers that are drawn for it."""
        if key is not None:
            random.seed(key)
            np.random.seed(key & 0xFFFFFFFF)
            torch.manual_seed(key & 0x7FFFFFFFFFFFFFFF)
        item = self.images.items[index]
        try:
            return self.transform(image)
        except (MemoryError, OSError, ValueError) as error:  # a line of pixels, resized to a square
            name = f"number {index}" if isinstance(item, np.ndarray) else item
            raise ValueError(
                f"image {name}: {image.width} x {image.height} pixels cannot be resized and cut: "
                f"{str(error) or type(error).__name__}"
            ) from None


class _Guarded(Dataset):
    """A split that hands errors over as values.

    A `DataLoader` would put the traceback of its process into the message of what it raises.
    """

    def __init__(self, split: PixelSplit) -> None:
        self.split = split

    def __getitems__(self, indices: Tensor) -> tuple[Tensor, Tensor] | ValueError:
        try:
            return self.split.__getitems__(indices)
        except ValueError as error:
            return error


def epoch_batches(count: int, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """The index lists of one training epoch: every image once, shuffled by (seed, epoch)."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return list(torch.randperm(count, generator=generator).split(batch_size))


def balanced_batches(
    labels: Tensor, batch_size: int, per_class: int, seed: int, epoch: int
) -> list[Tensor]:
    """The index lists of one training epoch with as many images of each class in a batch.

    There are as many batches as without; all are full. Classes take turns in random order, and so
    do the images of a class: none comes again before all others of its kind have come, and no
    batch has one twice unless its class has fewer than `per_class`.

    Args:
        labels: (N,) class numbers.
        batch_size: a multiple of `per_class`; the classes of a batch are all different.
        per_class: images of each.
        seed, epoch: which the order is a function of.
    Raises:
        ValueError: a batch wants more classes than there are.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)

    def shuffled(items: list[int]) -> list[int]:
        return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]

    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels.tolist()):
        members.setdefault(label, []).append(index)
    wanted = batch_size // per_class
    if wanted > len(members):
        raise ValueError(
            f"--per-class {per_class}: a batch of {batch_size} takes {wanted} classes, and the "
            f"images have {len(members)}; use a --batch-size of at most {per_class * len(members)}"
        )
    classes = sorted(members)
    waiting: list[int] = []  # classes, in the order in which they come
    queues: dict[int, list[int]] = {label: [] for label in classes}

    def extended(queue: list[int], items: list[int]) -> list[int]:
        # what still waits comes last in the next turn, so that none is beside itself
        return queue + sorted(shuffled(items), key=set(queue).__contains__)

    batches = []
    for _ in range(math.ceil(len(labels) / batch_size)):
        if len(waiting) < wanted:
            waiting = extended(waiting, classes)
        batch: list[int] = []
        for label in waiting[:wanted]:
            while len(queues[label]) < per_class:
                queues[label] = extended(queues[label], members[label])
            batch += queues[label][:per_class]
            queues[label] = queues[label][per_class:]
        waiting = waiting[wanted:]
        batches.append(torch.tensor(batch))
    return batches


def sequential_batches(count: int, batch_size: int) -> list[Tensor]:
    """The index lists of one evaluation pass."""
    return list(torch.arange(count).split(batch_size))


def share(batch: Tensor, rank: int, world: int) -> tuple[Tensor, float]:
    """(indices, weight) of one process: its part of a global batch and the weight of its mean loss.

    The weighted mean over processes of the per-process mean losses is the mean over the batch. A
    process left without images takes one with weight 0, because every process must take part in
    the gradient exchange.
    """
    mine = batch[rank::world]
    if len(mine) == 0:
        return batch[:1], 0.0
    return mine, len(mine) * world / len(batch)


def scale_and_shift(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """(x / 255 - mean) / std as one multiply-add: two tensors (1, C, 1, 1)."""
    scale, shift = (torch.tensor(v, dtype=torch.float32).view(1, -1, 1, 1) for v in (std, mean))
    return 1 / (255 * scale), -shift / scale


class Pipeline:
    """Batches of normalised images on the device.

    Args:
        split: a `PixelSplit`.
        mean, std: per channel, on the 0..1 scale.
        device: where batches go.
        workers: processes that decode when the split is not cached; 0 decodes in this one.
    """

    def __init__(
        self,
        split: PixelSplit,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str,
        workers: int = 0,
    ) -> None:
        self.split = split
        self.device = torch.device(device)
        self.workers = 0 if split.pixels is not None else workers
        self.scale, self.shift = (part.to(self.device) for part in scale_and_shift(mean, std))

    def __len__(self) -> int:
        return len(self.split)

    def batches(
        self, index_lists: Iterable[Tensor], epoch: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (images (B, 3, S, S) or clips (B, T, 3, S, S) in float32, labels (B,)) for every
        index list.

        Raises:
            ValueError: an image is unreadable, also when another process found it.
        """
        self.split.epoch = epoch
        loader = DataLoader(
            _Guarded(self.split),
            batch_sampler=cast(Any, index_lists),  # __getitems__ takes tensors as well
            collate_fn=_identity,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            # its own generator: the default one would advance the model's random stream
            generator=torch.Generator().manual_seed(0),
            worker_init_fn=_begin_work,
        )
        for batch in loader:
            if isinstance(batch, ValueError):
                raise batch
            pixels, labels = batch
            pixels = pixels.to(self.device, non_blocking=True)
            yield (
                pixels.float() * self.scale + self.shift,
                labels.to(self.device, non_blocking=True),
            )


def _identity(batch: Any) -> Any:
    return batch


def _begin_work(worker: int) -> None:
    """In a new worker: PIL is silent, for `survey` has said it all, and with the names of files.

    A batch system signals all processes of a job. When to stop is the run's to say, which needs its
    workers until then; of a second SIGTERM, which is the run's own, they end.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    for name in ("SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
