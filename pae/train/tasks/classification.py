"""A class per image, of a folder, a protocol's task or an embedded set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pae.backbones import named
from pae.train import embedded, methods, pixels
from pae.train.clips import read_clips
from pae.train.data import Images, Task, read_folder
from pae.train.declared import Given
from pae.train.protocols import read_task
from pae.train.stored import Columns
from pae.train.tasks.kind import Kind, Shown


class Own(Kind):
    """The task of this module."""

    def rehearse(self, given: Given | None = None) -> None:
        methods.rehearse(self.options, given)

    def read(self) -> Task:
        """An embedded set or a folder.

        Raises:
            ValueError, FetchError: as `read_folder`, `protocols.read_task`, `embedded.load_task`.
        """
        options = self.options
        sizes = {"train_size": options.train_size, "val_size": options.val_size}
        seed = options.seed if options.split_seed is None else options.split_seed
        if (frames := named.frames_of(options.model)) is not None:
            assert options.data is not None  # rehearsed
            task = read_clips(options.data, frames, **sizes, seed=seed, workers=options.workers)
        elif options.protocol is not None:
            task = read_task(options, sizes, seed)
        elif options.data is not None:
            columns = Columns(options.image_column, options.label_column)
            task = read_folder(options.data, **sizes, seed=seed, columns=columns)
        else:
            assert options.dataset is not None  # resolved options have one of the two
            task = embedded.load_task(options.dataset, **sizes, seed=seed)
        if options.test_size is not None:
            task = task.with_fewer_tests(options.test_size)
        return task.joined() if options.train_on == "trainval" else task

    def build(self, task: Task, say: Callable[[str], None] | None = None) -> Any:
        return methods.build_method(self.options, len(task.classes), say=say)

    def pipeline(self, images: Images, training: bool, shown: Shown) -> pixels.Pipeline:
        options = self.options
        transform, is_random = pixels.make_transform(
            options.augment,
            training,
            shown.size[0],
            shown.interpolation,
            shown.config,
            options.rand_augment,
        )
        split = pixels.PixelSplit(
            *(images, transform, is_random, options.seed, options.workers),
            ranges=shown.ranges,
            frames=named.frames_of(options.model),
        )
        return pixels.Pipeline(split, shown.mean, shown.std, shown.device, options.workers)

    def loss(self, module: Any, outputs: Any, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, label_smoothing=self.options.label_smoothing)

    def no_sums(self) -> Tensor:
        """Of losses and of hits."""
        return torch.zeros(2, dtype=torch.float64)

    def sums(
        self, module: Any, outputs: Tensor, targets: Tensor, loss: Tensor | None = None
    ) -> Tensor:
        if loss is None:
            total = F.cross_entropy(outputs, targets, reduction="sum")
        else:
            total = loss.detach() * len(targets)
        return torch.stack([total, (outputs.argmax(1) == targets).sum()])

    def means(self, sums: Tensor, images: int) -> tuple[float, ...]:
        loss, hits = sums.tolist()
        return loss / images, hits / images
