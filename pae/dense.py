"""Dense prediction: heads that make a map of classes of a frozen backbone's rows, and the model.

Shapes: images (B, C, H, W); rows of a block (B, n, D); maps (B, D, h, w), of one row per patch;
logits (B, classes, H', W').
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pae_kernels import maps as kernels

from . import checkpoint
from .backbones import BackboneView
from .errors import CheckpointError
from .kld import KLD
from .model import PromptedViT, blocks_of
from .plan import FrozenPlan
from .prompts import PromptFamily
from .task import TaskInfo

IGNORED = 255  # a pixel of no class


class SETRPUP(nn.Module):
    """SETR's progressive upsampling: LayerNorm, then `num_upsamples` times a 3 x 3 convolution,
    batch norm, ReLU and a bilinear enlargement, and a 1 x 1 convolution to the classes.

    Parameters are called as in mmsegmentation, so its checkpoints load. The last enlargement is
    done behind the 1 x 1 convolution rather than before it: both are linear, one along channels,
    the other along pixels with weights that sum to 1, so they may change places, and a quarter of
    the pixels is multiplied. In the fast engine the 3 x 3 convolutions change places with the
    enlargements before them too, where `pae_kernels.maps.enlarged_conv` has a kernel.

    Args:
        width: D of the rows. num_classes: of logits. channels: of the convolutions.
        num_upsamples: how many. scale: of each enlargement.
        bias: give the 3 x 3 convolutions a bias (PRO-VPT's head), which batch norm takes out again.

    Source: Zheng et al., Rethinking Semantic Segmentation from a Sequence-to-Sequence Perspective
    (2021); mmsegmentation's SETRUPHead: decode head 4 convolutions x2, auxiliary ones 2 x4 or 1 x4.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        channels: int = 256,
        num_upsamples: int = 4,
        scale: int = 2,
        bias: bool = False,
    ) -> None:
        super().__init__()
        _positive(
            width=width,
            num_classes=num_classes,
            channels=channels,
            num_upsamples=num_upsamples,
            scale=scale,
        )
        self.width, self.num_classes, self.channels = width, num_classes, channels
        self.num_upsamples, self.scale, self.bias = num_upsamples, scale, bias
        self.norm = nn.LayerNorm(width, eps=1e-6)
        widths = [width] + [channels] * num_upsamples
        self.up_convs = nn.ModuleList(
            nn.Sequential(_ConvNorm(own, out, bias)) for own, out in pairwise(widths)
        )
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        _init_logits(self.conv_seg)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        names = ("width", "num_classes", "channels", "num_upsamples", "scale", "bias")
        return {name: getattr(self, name) for name in names}

    def forward(
        self, maps: Tensor, engine: str = "reference", then: tuple[int, int] | None = None
    ) -> Tensor:
        """(B, D, h, w) to logits (B, classes, s h, s w), s = scale ** num_upsamples.

        Args:
            engine: "reference", or "fast": the same by other kernels.
            then: the size to which the caller enlarges what comes back, bilinearly. Where the last
                enlargement leads to just that size it is left to the caller, so that it can be one
                with the loss.
        """
        x = _normed(self.norm, maps)
        for i, part in enumerate(self.up_convs):
            x = cast(_ConvNorm, cast(nn.Sequential, part)[0])(x, self.scale if i else 1, engine)
        logits = self.conv_seg(x)
        size = logits.shape[-2] * self.scale, logits.shape[-1] * self.scale
        return logits if size == then else enlarged(logits, self.scale)


class _ConvNorm(nn.Module):
    def __init__(self, width: int, channels: int, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, channels, 3, padding=1, bias=bias)
        self.bn = nn.BatchNorm2d(channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor, scale: int = 1, engine: str = "reference") -> Tensor:
        """Of x, enlarged `scale` times first."""
        if scale > 1 and engine == "fast" and kernels.has_kernel("enlarged_conv", x):
            y = kernels.enlarged_conv(x.permute(0, 2, 3, 1), self.conv.weight, scale)
            x = y.permute(0, 3, 1, 2)
            x = x if self.conv.bias is None else x + self.conv.bias[:, None, None]
        else:
            x = self.conv(enlarged(x, scale))
        return F.relu(self.bn(x), inplace=True)


class LinearHead(nn.Module):
    """LayerNorm and one linear layer per patch: what the rows tell without a decoder.

    Args:
        width: D of the rows. num_classes: of logits.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        _positive(width=width, num_classes=num_classes)
        self.width, self.num_classes = width, num_classes
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.conv_seg = nn.Conv2d(width, num_classes, 1)
        _init_logits(self.conv_seg)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"width": self.width, "num_classes": self.num_classes}

    def forward(self, maps: Tensor) -> Tensor:
        """(B, D, h, w) to logits (B, classes, h, w)."""
        return self.conv_seg(_normed(self.norm, maps))


HEADS: dict[str, Callable[..., nn.Module]] = {"SETRPUP": SETRPUP, "LinearHead": LinearHead}


class DenseHeads(nn.Module):
    """The head of a `PromptedViT` that a `PromptedSegmenter` has: `decode`, and `auxiliary` ones.

    Attributes:
        out_blocks: whose rows the heads read, those of the auxiliary ones first.
        out_features: classes.
    """

    def __init__(
        self,
        decode: nn.Module,
        auxiliary: Sequence[nn.Module],
        out_blocks: tuple[int, ...],
        auxiliary_weight: float,
    ) -> None:
        super().__init__()
        self.decode, self.auxiliary = decode, nn.ModuleList(auxiliary)
        self.out_blocks, self.auxiliary_weight = out_blocks, auxiliary_weight
        self.out_features = int(cast(Any, decode).num_classes)

    def describe(self) -> dict[str, Any]:
        """As JSON has it, enough to build the heads again.

        Raises:
            ValueError: a head is none of this module's.
        """
        return {
            "decode": _described(self.decode),
            "auxiliary": [_described(head) for head in self.auxiliary],
            "out_blocks": list(self.out_blocks),
            "auxiliary_weight": self.auxiliary_weight,
        }

    def forward(self, features: Tensor) -> Tensor:
        raise TypeError(
            "this model's head reads maps of rows: call the PromptedSegmenter that was built of it"
        )


class PromptedSegmenter(nn.Module):
    """A `PromptedViT` whose blocks' rows become a class per pixel.

    The heads take the place of the model's own head, so that they are trained, saved and loaded
    with it, running statistics of batch norms included.

    Args:
        model: taken over.
        head: a module of maps (B, D, h, w) to logits, with attributes `width` and `num_classes`:
            `SETRPUP`, `LinearHead`, or one's own (which `save` refuses).
        out_blocks: whose rows the heads read, ascending, negative ones counted from the end: first
            a block per auxiliary head, then that of `head`.
        auxiliary: heads that have a loss in training and are not asked otherwise.
        auxiliary_weight: of each of those losses.

    Attributes:
        model: the `PromptedViT`. out_blocks: as numbers from 0.
        transform, task, classes, prompts, backbone, kld: as those of the model.

    Raises:
        TypeError, ValueError: a part of the wrong type; widths or classes that do not fit; a
            backbone of clips; a family that learns from the classes of whole images (DA-VPT).
    """

    transform: Callable[[Any], Tensor] | None = None

    def __init__(
        self,
        model: PromptedViT,
        head: nn.Module,
        out_blocks: Sequence[int] = (-1,),
        auxiliary: Sequence[nn.Module] = (),
        auxiliary_weight: float = 0.4,
    ) -> None:
        super().__init__()
        if not isinstance(model, PromptedViT):
            raise TypeError(f"model must be a PromptedViT, got {type(model).__name__}")
        if isinstance(model.head, DenseHeads):
            raise ValueError("model already belongs to a PromptedSegmenter: build a new one")
        if model.view.frames is not None:
            raise ValueError(
                f"model reads clips ({type(model.backbone).__name__}), and masks are of images"
            )
        family = type(model.prompts)
        if family.see_labels is not PromptFamily.see_labels:
            raise ValueError(
                f"prompts ({family.__name__}) that learn from the class of an image have none in a "
                "mask: use another family"
            )
        blocks = blocks_of("out_blocks", out_blocks, len(model.view.blocks))
        auxiliary = list(auxiliary)
        if len(blocks) != len(auxiliary) + 1:
            raise ValueError(
                f"out_blocks must be one per head, {len(auxiliary)} auxiliary and one, got "
                f"{list(out_blocks)}"
            )
        if not 0 <= auxiliary_weight < float("inf"):
            raise ValueError(f"auxiliary_weight must be at least 0, got {auxiliary_weight}")
        widths = model.view.shape.block_widths
        names = [f"auxiliary[{i}]" for i in range(len(auxiliary))] + ["head"]
        for name, own, block in zip(names, [*auxiliary, head], blocks):
            if not isinstance(own, nn.Module) or not hasattr(own, "num_classes"):
                raise TypeError(
                    f"{name} must be a module with width and num_classes, got {type(own).__name__}"
                )
            if getattr(own, "width", None) != widths[block]:
                raise ValueError(
                    f"{name}.width must be {widths[block]}, of the rows of block {block}, got "
                    f"{getattr(own, 'width', None)}"
                )
            if own.num_classes != head.num_classes:
                raise ValueError(
                    f"{name}.num_classes must be that of head, {head.num_classes}, got "
                    f"{own.num_classes}"
                )
        like = model.view.like
        heads = DenseHeads(head, auxiliary, blocks, float(auxiliary_weight))
        model.head = heads.to(like.device, like.dtype)
        self.model = model

    @property
    def heads(self) -> DenseHeads:
        """The heads, `model.head`."""
        return cast(DenseHeads, self.model.head)

    head = heads

    @property
    def out_blocks(self) -> tuple[int, ...]:
        """Whose rows the heads read."""
        return self.heads.out_blocks

    @property
    def view(self) -> BackboneView:
        """As `PromptedViT.view`."""
        return self.model.view

    @property
    def backbone(self) -> nn.Module:
        """The frozen backbone."""
        return self.model.backbone

    @property
    def prompts(self) -> PromptFamily:
        """The prompt family."""
        return self.model.prompts

    @property
    def kld(self) -> KLD | None:
        """The regulariser, or None."""
        return self.model.kld

    @property
    def num_classes(self) -> int:
        """Classes of a pixel."""
        return self.heads.out_features

    @property
    def task(self) -> TaskInfo | None:
        """What it is trained for; `save` keeps it."""
        return self.model.task

    @task.setter
    def task(self, task: TaskInfo | None) -> None:
        self.model.task = task

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes, where `task` has them."""
        return self.model.classes

    @property
    def device(self) -> torch.device:
        """Device of the backbone."""
        return self.model.device

    def forward(
        self,
        images: Tensor,
        engine: str = "reference",
        memory: str = "keep",
        auxiliary: bool = False,
    ) -> Any:
        """Logits (B, classes, H, W) of every pixel of images (B, C, H, W).

        Args:
            images, engine, memory: as in `PromptedViT.forward`.
            auxiliary: return what every head gives, a tuple with the auxiliary ones first, each
                still to be enlarged to (H, W): what `criterion` takes.

        Raises:
            ValueError, UnsupportedBackbone: as `PromptedViT.forward_features`; rows that are no
                grid.
        """
        heads, out_blocks = self.heads, self.out_blocks
        asked = out_blocks if auxiliary else out_blocks[-1:]
        rows = self.model.forward_features(images, asked, engine, memory)
        size = cast("tuple[int, int]", tuple(images.shape[-2:]))
        maps = [as_map(x, grid) for x, grid in zip(rows, self._grids(asked, size))]
        used = [*heads.auxiliary, heads.decode] if auxiliary else [heads.decode]
        outputs = tuple(
            h(m, engine, size) if isinstance(h, SETRPUP) else h(m) for h, m in zip(used, maps)
        )
        return outputs if auxiliary else resized(outputs[0], size)

    def loss(
        self, images: Tensor, masks: Tensor, engine: str = "reference", memory: str = "keep"
    ) -> Tensor:
        """The training loss of images and masks (B, H, W) of class numbers; 255 is ignored."""
        return self.criterion(self(images, engine, memory, auxiliary=True), masks, engine)

    def criterion(
        self, outputs: Sequence[Tensor], masks: Tensor, engine: str = "reference"
    ) -> Tensor:
        """Cross-entropy of the head, and `auxiliary_weight` times that of each auxiliary one, each
        a mean over all pixels, the ignored ones, which add nothing, included (mmsegmentation).

        Args:
            outputs: of `forward(..., auxiliary=True)`; enlarged to the masks' size.
            masks: (B, H, W) of an integer dtype.
            engine: as of `forward`.

        Raises:
            ValueError: another shape or dtype; on a CPU a number that is no class.
        """
        check_masks(masks, self.num_classes)
        masks = masks.long()
        *others, last = (pixel_loss(logits, masks, engine) for logits in outputs)
        weight = self.heads.auxiliary_weight
        return last + weight * torch.stack(others).sum() if others else last

    def penalty(self) -> Tensor:
        """As `PromptedViT.penalty`."""
        return self.model.penalty()

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """As `PromptedViT.parameter_groups`; all of the heads is in "head"."""
        return self.model.parameter_groups(lr, weight_decay)

    def trained_state(self) -> dict[str, Tensor]:
        """What training changes, by its name here, running statistics included."""
        return {f"model.{name}": value for name, value in self.model.trained_state().items()}

    def plan(self, **given: Any) -> FrozenPlan:
        """As `PromptedViT.plan`."""
        return self.model.plan(**given)

    def save(
        self,
        path: str | Path,
        extra: Mapping[str, str] | None = None,
        task: TaskInfo | None = None,
    ) -> None:
        """As `PromptedViT.save`; the file says which heads read which blocks.

        Raises:
            ValueError, OSError: as there; a head that is none of `pae.dense`.
        """
        self.model.save(path, extra, task)

    def load(self, path: str | Path, other_size: bool = False) -> PromptedSegmenter:
        """As `PromptedViT.load`, of a file with the same heads."""
        self.model.load(path, other_size)
        return self

    @classmethod
    def from_file(
        cls, path: str | Path, backbone: nn.Module, other_size: bool = False
    ) -> PromptedSegmenter:
        """Build what `save` wrote on top of `backbone`, heads included.

        Raises:
            CheckpointError: as `PromptedViT.from_file`, or a file without heads of this kind.
        """
        dense = checkpoint.read(path).dense
        if dense is None:
            raise CheckpointError(
                f"checkpoint {path} holds no heads for dense prediction: use "
                "PromptedViT.from_file, or pae.load"
            )
        built: list[PromptedSegmenter] = []

        def build(*parts: Any, num_classes: int | None, **more: Any) -> PromptedViT:
            model = PromptedViT(*parts, **{**more, "num_classes": 1})
            try:
                heads = [_built(part) for part in [*dense["auxiliary"], dense["decode"]]]
                place = dense["out_blocks"], heads[:-1], dense["auxiliary_weight"]
                built.append(cls(model, heads[-1], *place))
            except (KeyError, TypeError) as error:
                raise ValueError(f"its heads cannot be built: {error}") from error
            return model

        checkpoint.build(build, path, backbone, other_size)
        return built[0]

    def _grids(self, blocks: Sequence[int], size: tuple[int, int]) -> list[tuple[int, int]]:
        """(rows, columns) of the patch grid in each of these blocks."""
        view, geometries = self.view, self.view.geometry(size)
        patch = view.shape.patch_size
        grid = -(-size[0] // patch[0]), -(-size[1] // patch[1])
        found = []
        for block in blocks:
            geometry = geometries[block]
            found.append(geometry.grid if any(geometry.grid) else grid)
        if not view.shape.widths and grid[0] * grid[1] != (
            have := view.num_rows(size) - view.num_prefix_tokens
        ):
            raise ValueError(
                f"{type(view.module).__name__} makes {have} rows of images of {size} pixels, which "
                f"is no grid of {grid}"
            )
        return found


def as_map(rows: Tensor, grid: tuple[int, int]) -> Tensor:
    """Rows (B, h w, D) as a map (B, D, h, w), a view: channels last in memory."""
    return rows.unflatten(1, grid).permute(0, 3, 1, 2)


def enlarged(x: Tensor, scale: int) -> Tensor:
    """Maps (B, C, h, w), `scale` times as large, bilinear between the centres of pixels."""
    if scale == 1:
        return x
    return F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)


def resized(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits (B, classes, h, w) at another size, bilinear between the centres of pixels."""
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def pixel_loss(logits: Tensor, masks: Tensor, engine: str = "reference") -> Tensor:
    """Cross-entropy of logits (B, classes, h, w), enlarged to masks (B, H, W) int64: the sum over
    pixels of a class, divided by the number of all. The fast engine does not make them that large
    where `pae_kernels.maps.pixel_loss` has a kernel.
    """
    if engine == "fast" and kernels.has_kernel("pixel_loss", logits):
        total = kernels.pixel_loss(logits.permute(0, 2, 3, 1), masks, IGNORED)
    else:
        logits = resized(logits, cast("tuple[int, int]", tuple(masks.shape[-2:])))
        total = F.cross_entropy(logits, masks, ignore_index=IGNORED, reduction="sum")
    return total / masks.numel()


def check_masks(masks: Tensor, num_classes: int) -> None:
    """Raise ValueError unless masks are (B, H, W) integers; on a CPU, of classes or 255."""
    if not isinstance(masks, Tensor) or masks.dim() != 3 or masks.is_floating_point():
        got = f"{tuple(masks.shape)} {masks.dtype}" if isinstance(masks, Tensor) else type(masks)
        raise ValueError(f"masks must be an integer tensor (B, H, W), got {got}")
    if masks.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = masks[(masks != IGNORED) & ((masks < 0) | (masks >= num_classes))]
    if len(wrong):
        raise ValueError(
            f"masks must hold numbers below {num_classes}, or {IGNORED}, got {int(wrong[0])}"
        )


def _normed(norm: nn.LayerNorm, maps: Tensor) -> Tensor:
    """LayerNorm along the channels of maps, which stay as they lie in memory."""
    return norm(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _init_logits(layer: nn.Conv2d) -> None:
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(cast(Tensor, layer.bias))


def _positive(**numbers: int) -> None:
    for name, value in numbers.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def _described(head: nn.Module) -> dict[str, Any]:
    name = type(head).__name__
    if HEADS.get(name) is not type(head):
        raise ValueError(
            f"head ({name}) is none of pae.dense ({', '.join(HEADS)}): a file could not say what "
            "it is; save model.trained_state() yourself"
        )
    return {"name": name, "config": cast(Any, head).config()}


def _built(described: Mapping[str, Any]) -> nn.Module:
    return HEADS[described["name"]](**described["config"])
