"""What the loop asks of a task. `classification` is the model of all others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

import pae
from pae.train import pixels
from pae.train.data import Images, Task
from pae.train.declared import Given
from pae.train.images import Ranges
from pae.train.options import Options


class Shown(NamedTuple):
    """How images become a model's input.

    Attributes:
        config: timm's data configuration of the backbone. size: (height, width).
        interpolation: by name. ranges: of images of more than 8 bits.
        mean, std: per channel, on the 0..1 scale. device: where batches go.
    """

    config: dict[str, Any]
    size: tuple[int, int]
    interpolation: str
    ranges: Ranges
    mean: Sequence[float]
    std: Sequence[float]
    device: torch.device


class Kind(ABC):
    """A task of resolved options: which data, which module, which loss, which numbers.

    A batch is (inputs, targets); outputs are what the module makes of inputs. A module has the face
    that `methods` describes.

    Attributes:
        metrics: names of what is measured, in the order of `means`: "loss", then that by which
            epochs and methods are compared, then others. Each is a column of metrics.csv behind
            ``train_`` and ``val_``; all but the loss are in the result, behind ``val_`` and
            ``test_``.
        score: the second of these. title: what a table and a figure call it.
    """

    metrics: ClassVar[tuple[str, ...]] = ("loss", "accuracy")
    title: ClassVar[str] = "accuracy"

    def __init__(self, options: Options) -> None:
        self.options = options

    @property
    def score(self) -> str:
        """The metric by which epochs and methods are compared: more is better."""
        return self.metrics[1]

    # ---- before the first step

    @abstractmethod
    def rehearse(self, given: Given | None = None) -> None:
        """Refuse options that do not go together or cannot be built; as `methods.rehearse`."""

    @abstractmethod
    def read(self) -> Task:
        """The data; raises ValueError naming folder or file."""

    @abstractmethod
    def build(self, task: Task, say: Callable[[str], None] | None = None) -> Any:
        """The module that is trained; as `methods.build_method`."""

    def prompted(self, module: nn.Module) -> pae.PromptedViT | None:
        """The prompted tower of a module, whose family has its hooks called; None without one."""
        return module if isinstance(module, pae.PromptedViT) else None

    def evaluation_crop(self, config: dict[str, Any]) -> dict[str, Any]:
        """How evaluation crops, as timm's `crop_pct` and `crop_mode`."""
        return pixels.evaluation_crop(self.options.augment, config)

    @abstractmethod
    def pipeline(self, images: Images, training: bool, shown: Shown) -> Any:
        """Batches of a split, with the face of `pixels.Pipeline`."""

    def start(  # noqa: B027 (most tasks have nothing to do)
        self, module: Any, batches: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    ) -> None:
        """In a new run, before its first state is saved: lets the module see the training data.

        Args:
            batches: one pass over the training images, in the order of the first epoch.
        """

    # ---- a step

    def forward(self, module: nn.Module, inputs: Tensor) -> Any:
        """Outputs; `module` may be wrapped, and is in training or in eval mode."""
        return module(inputs, engine=self.options.engine)

    @abstractmethod
    def loss(self, module: Any, outputs: Any, targets: Tensor) -> Tensor:
        """The training loss, a mean over the images of the batch."""

    # ---- what is measured

    @abstractmethod
    def no_sums(self) -> Tensor:
        """Zeros of float64, to which `sums` are added: over images, and over processes."""

    @abstractmethod
    def sums(
        self, module: Any, outputs: Any, targets: Tensor, loss: Tensor | None = None
    ) -> Tensor:
        """What a batch adds, the sum of its losses first, on the device: nobody waits for it.

        Args:
            loss: of a training step, known already; None: that of evaluation, without what only
                training has (smoothing, auxiliary terms).
        """

    @abstractmethod
    def means(self, sums: Tensor, images: int) -> tuple[float, ...]:
        """`metrics` of so many images."""

    def details(self, sums: Tensor, task: Task) -> dict[str, Any]:
        """Further entries of a result, of the sums over the test images, each as JSON has it."""
        return {}
