"""A class per pixel: a prompted backbone, heads that make maps of its rows, and masks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

import pae
from pae.backbones import named
from pae.choices import LEGACY
from pae.dense import pixel_loss, resized
from pae.train import embedded, masks, methods, pixels
from pae.train.data import Images, Task
from pae.train.declared import Given, declared
from pae.train.options import OWN_POOL, Options
from pae.train.tasks.kind import Kind, Shown

# what it has no use for: its words are refused, not passed over
_FOR_ONE_CLASS = {
    "protocol": "its tasks have a class per image",
    "per_class": "an image has many classes",
    "label_smoothing": "the loss is that of mmsegmentation",
    "rand_augment": "it moves pixels away from their masks",
    "mpa": "it ranks windows by the class of an image",
}


class Own(Kind):
    """The task of this module."""

    metrics: ClassVar[tuple[str, ...]] = ("loss", "mean_iou", "pixel_accuracy")
    title: ClassVar[str] = "mean IoU"

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.classes = 0  # known once the data are read

    # ---- before the first step

    def rehearse(self, given: Given | None = None) -> None:
        options, given = self.options, given or Given()

        def called(name: str) -> str:
            return options.called(given, name)

        task = f"--task {options.task}"
        for name, why in _FOR_ONE_CLASS.items():
            if getattr(options, name) != declared(Options)[name].default:
                raise ValueError(f"{called(name)} is not for {task}: {why}")
        if options.method == "full":
            raise ValueError(
                f"{called('method')}: {task} does not train all weights; give linear (the heads "
                "alone) or a method with prompts"
            )
        if options.augment == "timm" or options.interpolation == LEGACY:
            name = "augment" if options.augment == "timm" else "interpolation"
            raise ValueError(f"{called(name)} is not for {task}: give --augment none or crop")
        if options.pool != OWN_POOL:
            raise ValueError(
                f"{called('pool')} is not for {task}: heads read rows, no mean of them"
            )
        if options.data is None and options.dataset not in embedded.MASKED:
            sets = ", ".join(embedded.MASKED)
            raise ValueError(
                f"{task} needs --data FOLDER, images with masks, or --dataset {sets}; "
                f"{options.dataset} has a class per image"
            )
        if named.frames_of(options.model) is not None:
            raise ValueError(f"{called('model')}: it reads clips, and masks are of images")
        methods.rehearse(options, given, lambda: self._module(2, skeleton=True))

    def read(self) -> Task:
        """An embedded set with masks, or a folder.

        Raises:
            ValueError: as `masks.read_folder`.
        """
        options = self.options
        sizes: dict[str, Any] = {
            name: getattr(options, name) for name in ("train_size", "val_size", "test_size")
        }
        sizes["seed"] = options.seed if options.split_seed is None else options.split_seed
        if options.data is not None:
            task = masks.read_folder(options.data, **sizes, workers=options.workers)
        else:
            assert options.dataset is not None  # rehearsed
            task = embedded.load_masked(options.dataset, **sizes)
        if options.train_on == "trainval" and task.val is not None:
            both = masks.Masked(
                [*task.train.items, *task.val.items],
                [*task.train.labels, *task.val.labels],
            )
            task = Task(task.name, task.classes, both, None, task.test)
        return task

    def build(self, task: Task, say: Callable[[str], None] | None = None) -> pae.PromptedSegmenter:
        self.classes = len(task.classes)
        return self._module(self.classes, say=say)

    def _module(
        self, classes: int, skeleton: bool = False, say: Callable[[str], None] | None = None
    ) -> pae.PromptedSegmenter:
        options = self.options
        # a head of as many classes is replaced: where weights are random, `pae.load` draws them so
        made = methods.build_method(options, classes, skeleton, say)
        model = made.frozen if isinstance(made, methods.LinearProbe) else made
        assert isinstance(model, pae.PromptedViT)  # rehearsed
        widths = model.view.shape.block_widths
        blocks = self._blocks(len(widths))
        with torch.device("meta") if skeleton else contextlib.nullcontext():
            head = self._head(widths[blocks[-1]], classes)
            others = [
                pae.SETRPUP(widths[block], classes, options.head_channels, 2, 4)
                for block in blocks[:-1]
            ]
        return pae.PromptedSegmenter(model, head, blocks, others, options.auxiliary_weight)

    def _head(self, width: int, classes: int) -> nn.Module:
        if self.options.head == "linear":
            return pae.LinearHead(width, classes)
        return pae.SETRPUP(width, classes, self.options.head_channels)

    def _blocks(self, depth: int) -> tuple[int, ...]:
        """Of the heads: as given, or the published 9, 14, 19, 23 of 24 in a backbone's depth."""
        options = self.options
        if options.out_blocks is None:
            if options.head == "linear" or options.auxiliary_weight == 0:
                return (depth - 1,)
            shares = (10 / 24, 15 / 24, 20 / 24, 1)
            return tuple(sorted({max(0, round(depth * share) - 1) for share in shares}))
        try:
            found = [int(text) for text in options.out_blocks.split(",")]
            return pae.model.blocks_of("out_blocks", found, depth)
        except ValueError as error:
            raise ValueError(
                "out_blocks must be numbers of blocks with commas between, e.g. 9,14,19,23: "
                f"{error}"
            ) from None

    def prompted(self, module: nn.Module) -> pae.PromptedViT | None:
        return cast(pae.PromptedSegmenter, module).model

    def evaluation_crop(self, config: dict[str, Any]) -> dict[str, Any]:
        return pixels.evaluation_crop("none")

    def pipeline(self, images: Images, training: bool, shown: Shown) -> pixels.Pipeline:
        from timm.data.transforms import str_to_pil_interp

        options = self.options
        resize, _ = pixels.make_transform("none", False, shown.size[0], shown.interpolation)
        fill = tuple(min(255, round(255 * value)) for value in shown.mean)
        number = int(str_to_pil_interp(shown.interpolation))
        split = masks.MaskedSplit(
            images,
            masks.Joint(shown.size[0], resize, number, fill),
            self.classes,
            is_random=training and options.augment == "crop",
            seed=options.seed,
            workers=options.workers,
            ranges=shown.ranges,
            reduce_zero=options.reduce_zero_label,
        )
        place = shown.mean, shown.std, shown.device, options.workers
        return pixels.Pipeline(cast(Any, split), *place)

    # ---- a step

    def forward(self, module: nn.Module, inputs: Tensor) -> Any:
        """In training what every head gives, else logits of every pixel."""
        return module(inputs, engine=self.options.engine, auxiliary=module.training)

    def loss(self, module: Any, outputs: Sequence[Tensor], targets: Tensor) -> Tensor:
        return module.criterion(outputs, targets, engine=self.options.engine)

    # ---- what is measured

    def no_sums(self) -> Tensor:
        """Of losses, and of pixels of class i that were taken for class j, row by row."""
        return torch.zeros(1 + self.classes**2, dtype=torch.float64)

    def sums(
        self, module: Any, outputs: Any, targets: Tensor, loss: Tensor | None = None
    ) -> Tensor:
        logits = outputs[-1] if isinstance(outputs, tuple) else outputs
        if loss is None:
            loss = pixel_loss(logits, targets.long())
        total = (loss.detach() * len(targets)).double()[None]
        size = targets.shape[-2], targets.shape[-1]
        found = confusion(resized(logits, size).argmax(1), targets, self.classes)
        return torch.cat([total, found.flatten().double()])

    def means(self, sums: Tensor, images: int) -> tuple[float, ...]:
        found = sums[1:].view(self.classes, self.classes)
        return float(sums[0]) / images, mean_iou(found), pixel_accuracy(found)

    def details(self, sums: Tensor, task: Task) -> dict[str, Any]:
        found = ious(sums[1:].view(self.classes, self.classes))
        return {"test_iou": dict(zip(task.classes, found, strict=True))}


def confusion(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """(classes, classes) int64: pixels of class i that were taken for class j; 255 counts nowhere.

    Args:
        predicted, truth: class numbers, of one shape.
    """
    counts = truth < classes
    pairs = truth[counts].long() * classes + predicted[counts]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def ious(found: Tensor) -> list[float | None]:
    """Intersection over union of each class; None of one that nobody has and nobody was taken for.

    Source: as mmsegmentation counts them, over all pixels of a split.
    """
    hits, either = found.diagonal(), found.sum(0) + found.sum(1) - found.diagonal()
    return [h / e if e else None for h, e in zip(hits.tolist(), either.tolist())]


def mean_iou(found: Tensor) -> float:
    """Their mean over the classes that have one; 0 where none has."""
    known = [value for value in ious(found) if value is not None]
    return sum(known) / len(known) if known else 0.0


def pixel_accuracy(found: Tensor) -> float:
    """Share of the pixels that were taken for what they are; 0 of none."""
    total = float(found.sum())
    return float(found.diagonal().sum()) / total if total else 0.0
