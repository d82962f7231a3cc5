"""PromptedViT: a frozen backbone, a prompt family and a head. Its forward is the reference
definition.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint, windows
from . import engine as fast
from .backbones import BackboneView, read_backbone, trained
from .choices import ENGINES, POOLS
from .kld import KLD
from .plan import FrozenPlan, Plans, wanted_dtype
from .prompts import PromptFamily
from .prompts.base import check_choice
from .prompts.contracts import check_rows
from .sequence import (
    between_blocks,
    bypass_of,
    cut_rows,
    entering,
    insert_rows,
    pooled_rows,
    sequence_lengths,
    touches_rows,
)
from .task import TaskInfo

uncompiled = partial(
    torch.compiler.disable,
    reason="pae folds the frozen backbone outside of graphs: leave out fullgraph=True, or use "
    'engine="reference"',
)
# the models of a backbone that live
_models: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[PromptedViT]]
_models = weakref.WeakKeyDictionary()

_uncompiled_run = uncompiled(fast.run)
_uncompiled_windows = uncompiled(windows.run)
_uncompiled_run_to = uncompiled(fast.run_to)
_uncompiled_windows_to = uncompiled(windows.run_to)


class PromptedViT(nn.Module):
    """A frozen vision transformer with learned prompts and a trained head.

    The backbone is taken over: frozen, kept in eval mode (so dropout and drop-path are off), and
    its head moves to `model.head`. `forward` is the definition: concatenate, run the backbone's own
    blocks, cut off. `pae.fast_forward` equals it in value and in every gradient.

    Args:
        backbone: a vision transformer of timm, or a module with the same attributes; of Hugging
            Face's transformers, of open_clip, of torchvision, or of VPT's released code; see
            `pae models`.
        prompts: an unused prompt family, e.g. `pae.prompts.VPTDeep(50)`.
        kld: Koopman-Lyapunov regulariser, or None.
        num_classes: a new head of this many classes (VPT's initialisation); None keeps the
            backbone's head.
        pool: whose rows of the last block an average-pooled backbone has in its mean (or maximum):
            "image": the image's, which is what the backbone does without prompts. "all": the
            prompts' too, as the released code of VPT ("original"), BPT, SPT and their descendants
            has it on MAE backbones. "prompts": the prompts' alone ("prompt_pool" in VPT). In deep
            prompting the prompts of the last block count, where prompts live on (VPT-shallow, LSPT)
            all of them; with none there, "all" is "image". Learned keys and values have no rows
            (E2VPT, APT). Where the norm is, behind the mean or before it, is the backbone's
            affair: `pae.backbones.average_pooled`.
        train_backbone: what else is trained: "biases" (all of the backbone's, VPT's prompt+bias),
            "da-vpt+" (the class token, norm1, and the biases of keys, values, proj, norm2 and fc2),
            names of the backbone's parameters, patterns ("blocks.*.norm1.*"), or several of these;
            "blocks.0.attn.qkv.bias:kv" is the part of keys and values. In blocks: biases, and the
            norms' own parameters; outside of them: any. Everything else stays frozen.

    Attributes:
        backbone, prompts, kld, head: the parts. view: what pae reads of the backbone.
        trained_backbone: what `train_backbone` stands for, one entry per parameter.
        task: a `pae.TaskInfo` or None: what it is trained for. `save` keeps it, `load` gives it
            back.
        pool: as given; may be set, and is checked then.
        transform: set by `pae.load`: an image of PIL, a path or a uint8 array to the tensor
            (C, H, W) that enters the model; None before.

    Raises:
        UnsupportedBackbone: naming the attribute that pae cannot express.
        TypeError, ValueError: on parts of a wrong type or counts that do not fit the backbone; on
            a backbone of another model that lives, where one of both trains a part of it; on
            a `pool` other than "image" where the readout pools no rows (a class token's), or the
            last block has no prompts for "prompts".
    """

    backbone: nn.Module
    prompts: PromptFamily
    kld: KLD | None
    head: nn.Module
    view: BackboneView
    trained_backbone: tuple[str, ...] = ()
    task: TaskInfo | None = None
    transform: Callable[[Any], Tensor] | None = None
    _pool: str = "image"
    runs_fast = True  # what `fast_forward` looks for

    def __init__(
        self,
        backbone: nn.Module,
        prompts: PromptFamily,
        kld: KLD | None = None,
        num_classes: int | None = None,
        pool: str = "image",
        train_backbone: str | Iterable[str] = (),
    ) -> None:
        super().__init__()
        if not isinstance(prompts, PromptFamily):
            raise TypeError(f"prompts must be a PromptFamily, got {type(prompts).__name__}")
        if kld is not None and not isinstance(kld, KLD):
            raise TypeError(f"kld must be a pae.KLD or None, got {type(kld).__name__}")
        if num_classes is not None and (type(num_classes) is not int or num_classes < 1):
            raise ValueError(
                f"num_classes must be an integer of at least 1 or None, got {num_classes!r}"
            )
        self.view = read_backbone(backbone)
        self.trained_backbone = trained.named(self.view, train_backbone)
        _check_alone(backbone, self.trained_backbone)
        own_head = self.view.head
        if num_classes is None and self.view.other_head is not None:
            raise ValueError(
                "num_classes must be given: the backbone averages the logits of its head and of "
                f"{self.view.other_head}, and one head is kept"
            )
        if num_classes is None:
            if own_head is None or isinstance(own_head, nn.Identity):
                raise ValueError(
                    "num_classes must be given: the backbone has no head (num_classes=0, or "
                    "another PromptedViT took it)"
                )
            head = own_head
        else:
            head = _new_head(self.view.feature_width, num_classes)
        like = self.view.like
        if prompts.reads_class_attention and not self.view.shape.has_class_token:
            raise ValueError(
                f"prompts ({type(prompts).__name__}) reads the class token's attention, and the "
                "backbone has no class token"
            )
        if kld is not None and prompts.moves_prompts:
            raise ValueError(
                "kld pairs prompt j of a block with prompt j of the next, and prompts "
                f"({type(prompts).__name__}) moves prompts between blocks"
            )
        prompts.bind(self.view.shape)
        if type(prompts).head_keys_values is not PromptFamily.head_keys_values:
            _check_heads(self.view, prompts)
        check_pool(pool, self.view, prompts)
        if kld is not None:
            counts, shape = prompts.prompt_counts, self.view.shape
            of_runs = [{counts[i] for i in run} for run in kld.runs(shape.depth, shape.widths)]
            if any(len(found) != 1 or 0 in found for found in of_runs):
                which = "" if kld.first_block else " after the first"
                which += " of a stage" if shape.widths else ""
                raise ValueError(
                    "kld pairs the prompts of neighbouring blocks, which needs the same number of "
                    f"prompts (at least one) in every block{which}, got {counts}"
                )
            kld.bind(shape.depth, shape.width, shape.widths)
            kld.to(like.device, like.dtype)
        self.view.take_head()
        self.backbone = backbone.requires_grad_(False).eval()
        self.prompts = prompts.to(like.device, like.dtype)
        self.kld = kld
        self.head = head.to(like.device, like.dtype).requires_grad_(True)
        for parameter in self._trained_backbone().values():
            parameter.requires_grad_(True)
        trained.release(backbone)
        trained.hold(backbone, self.trained_backbone)
        self._pool = pool
        self._plans: Plans | None = None
        _models.setdefault(backbone, weakref.WeakSet()).add(self)

    @property
    def pool(self) -> str:
        """Whose rows of the last block the readout pools: "image", "all" or "prompts"."""
        return self._pool

    @pool.setter
    def pool(self, pool: str) -> None:
        check_pool(pool, self.view, self.prompts)
        self._pool = pool

    @property
    def num_classes(self) -> int:
        """Number of logits; 0 when the head is neither a linear layer nor ends in `last_layer`."""
        return getattr(getattr(self.head, "last_layer", self.head), "out_features", 0)

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes in the order of the logits, where `task` has them."""
        return None if self.task is None else self.task.classes

    def train(self, mode: bool = True) -> PromptedViT:
        """Training mode for prompts, regulariser and head; the backbone always stays in eval
        mode.
        """
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, images: Tensor, engine: str = "reference", memory: str = "keep") -> Tensor:
        """Logits (B, classes) of images (B, C, H, W), or of clips (B, T, C, H, W) where the
        backbone reads those.

        Args:
            engine: "reference" runs the backbone's own blocks on concatenated sequences; "fast" is
                `pae.fast_forward`.
            memory: for "fast", see `pae.fast_forward`.

        Raises:
            ValueError: on images of a wrong shape, size or dtype, or an unknown engine.
            UnsupportedBackbone: from "fast", see `plan`.
        """
        return self.head(self.features(images, engine, memory))

    def features(self, images: Tensor, engine: str = "reference", memory: str = "keep") -> Tensor:
        """What the head reads, (B, F); arguments and errors as in `forward`."""
        self._check(images, engine)
        view, at = self.view, self.view.num_prefix_tokens
        if engine == "fast":
            # an observer leaves what it saw per thread, which breaks a graph: outside of the walk,
            # since PyTorch 2.11 cannot go on from a break inside
            run = _uncompiled_run if self.prompts.observed else fast.run
            run = _uncompiled_windows if view.shape.widths else run
            rows = run(*self._given(images), memory, self._pool)
        else:
            x, entered, _ = self._reference(images)
            rows = pooled_rows(x, at, entered, self._pool)
        features = view.readout(rows)
        self.prompts.observe_features(features)
        return features

    def forward_features(
        self,
        images: Tensor,
        out_blocks: Sequence[int],
        engine: str = "reference",
        memory: str = "keep",
    ) -> list[Tensor]:
        """The image's rows as blocks leave them, for dense prediction: per block (B, n, D), row by
        row of the patch grid, prompts and prefix tokens cut off, with no norm behind them.

        Blocks behind the last of `out_blocks` are not run. Where blocks look into windows (Swin)
        each has the grid and the width of its stage.

        Args:
            images, engine, memory: as in `forward`.
            out_blocks: numbers of blocks, ascending; negative ones count from the end.

        Raises:
            ValueError: as `forward`, or a number that is no block's, comes twice or out of order.
        """
        self._check(images, engine)
        blocks = blocks_of("out_blocks", out_blocks, len(self.view.blocks))
        if engine != "fast":
            return self._reference(images, blocks)[2]
        run = _uncompiled_run_to if self.prompts.observed else fast.run_to
        run = _uncompiled_windows_to if self.view.shape.widths else run
        return run(*self._given(images), memory, blocks)

    def _check(self, images: Tensor, engine: str) -> None:
        if self.trained_backbone and not torch.compiler.is_compiling():
            trained.hold(self.backbone, self.trained_backbone)
        if getattr(self, "_is_replica", False):
            raise RuntimeError(
                "a PromptedViT cannot run as a replica of torch.nn.DataParallel, whose copies have "
                "no backbone of their own: use DistributedDataParallel"
            )
        self._check_read()
        self.view.check_images(images)
        if engine not in ENGINES:
            raise ValueError(f"engine must be one of {ENGINES}, got {engine!r}")

    def _check_read(self) -> None:
        """Raise where another module stands in the place of the backbone that is read."""
        own = self.backbone
        if self.view.module is not own and getattr(own, "_orig_mod", own) is not self.view.module:
            raise RuntimeError(
                f"model.backbone was replaced by another {type(own).__name__}, and the model reads "
                "the one that it was built on: build a new PromptedViT on it, or load its weights "
                "into the old one"
            )

    def _given(self, images: Tensor) -> tuple[FrozenPlan, BackboneView, PromptFamily, Tensor]:
        """What the fast engine walks."""
        height, width = images.shape[-2:]
        plan = self.plan(size=(height, width), settled=False)
        return plan, self.view, self.prompts, self.view.embed(images)

    def _reference(
        self, images: Tensor, blocks: Sequence[int] = ()
    ) -> tuple[Tensor, int, list[Tensor]]:
        """What leaves the last block, the prompt rows in it, and the image rows that leave
        `blocks`, behind the last of which nothing is run.
        """
        found: list[Tensor] = []
        view, family, at = self.view, self.prompts, self.view.num_prefix_tokens
        family.start_forward()
        x, entered, attention = view.embed(images), 0, None
        height, width = images.shape[-2:]
        geometries = view.geometry((height, width))
        if family.mixes_windows:
            geometries = [geometry.mixed() for geometry in geometries]
        for i, geometry in enumerate(geometries):
            x = view.enter(i, x, geometries)
            if touches_rows(family, i):
                query = partial(view.class_query, i)
                x = between_blocks(family, i, x, at, entered, attention, query)
            rows, kv = family.block_prompts(i, x), family.head_keys_values(i, x)
            count = 0
            if rows is not None:
                group, count = family.group_index(x), rows.shape[-2]
                check_rows(family, i, rows, group)
                rows = entering(family, view, rows)
                x = insert_rows(x, rows if group is None else rows[group], at)
            if family.reads_class_attention and i + 1 < len(view.blocks):
                attention = view.class_attention(i, x, geometry, kv)
                attention = cut_rows(attention.transpose(1, 2), at, count).transpose(1, 2)
            x = view.run_block(i, x, geometry, kv, *bypass_of(family, i))
            if family.enters_sequence or i + 1 == len(view.blocks):
                entered += count
            else:
                x = cut_rows(x, at, count)
            if i in blocks:
                found.append(x[:, at + entered :])
                if len(found) == len(blocks):
                    _ask_the_rest(family, i, x)
                    break
        return x, entered, found

    def penalty(self) -> Tensor:
        """Scalar to add to the training loss: KLD's two terms and the family's own; 0 in eval mode.

        KLD depends on parameters alone, so it is the same on every rank and for every batch, unless
        the family makes its prompts from images (VAPT: the mean over the last forward's batch); a
        family's own penalty may read the last forward's rows (DA-VPT).

        Raises:
            RuntimeError: it reads the last forward, and that had no graph where gradients are
                enabled now.
        """
        total = torch.zeros((), device=self.device)
        if not self.training:
            return total
        if self.kld is not None:
            if self.prompts.depends_on_input:
                self.prompts.require_graph()
            consistency, lyapunov = self.kld.terms(self.prompts.raw_prompts())
            total = consistency + lyapunov
        own = self.prompts.penalty()
        return total if own is None else total + own

    def _trained_backbone(self) -> dict[str, nn.Parameter]:
        """The parameters of `trained_backbone`, by their names in the model."""
        own = trained.names(self.trained_backbone)
        return {f"backbone.{name}": self.backbone.get_parameter(name) for name in own}

    def _refuse_unnamed(self, what: str) -> None:
        """Raise when `what` would leave out a parameter that somebody let require a gradient."""
        own = self._trained_backbone()
        for name, parameter in self.backbone.named_parameters(prefix="backbone"):
            if parameter.requires_grad and name not in own:
                raise ValueError(
                    f"{name} requires a gradient and is no part of {what}: name it when the model "
                    "is built (train_backbone=...), or call requires_grad_(False)"
                )

    @property
    def device(self) -> torch.device:
        """Device of the backbone."""
        return self.view.like.device

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict]:
        """Trainable parameters in the groups of the papers: decay on everything except the head's
        bias, and what is trained of the backbone, which decay would pull away from its start.

        Returns:
            dicts with "name" ("prompts", "kld", "backbone", "head", "head_bias"), "params", "lr",
            "weight_decay", as torch.optim takes them; empty groups are left out.

        Raises:
            ValueError: a parameter of the backbone requires a gradient and was not named.

        Source: VPT (SGD; only the head bias is exempt from decay), and PAE, whose K, L and lift are
        decayed too.
        """
        self._refuse_unnamed("the parameter groups")
        head = dict(self.head.named_parameters())
        bias = [head.pop(name) for name in ("bias", "last_layer.bias") if name in head]
        parts = {
            "prompts": list(self.prompts.parameters()),
            "kld": [] if self.kld is None else list(self.kld.parameters()),
            "backbone": list(self._trained_backbone().values()),
            "head": list(head.values()),
            "head_bias": bias,
        }
        return [
            {
                "name": name,
                "params": params,
                "lr": lr,
                "weight_decay": 0.0 if name in ("backbone", "head_bias") else weight_decay,
            }
            for name, params in parts.items()
            if params
        ]

    @uncompiled
    def plan(
        self,
        dtype: torch.dtype | None = None,
        size: tuple[int, int] | None = None,
        settled: bool = True,
    ) -> FrozenPlan:
        """The folded backbone for products in `dtype` (autocast's dtype, else the backbone's, when
        None).

        Built at first use and kept. Rebuilt when something that was folded has changed: a parameter
        replaced, moved, re-typed or written in place, a module replaced, an attribute set (eps,
        scale, activation). Writes through `.data` leave no trace that PyTorch records, so call
        `drop_plans()` after those.

        Args:
            dtype: of the products.
            size: (H, W) of the images to come; the backbone's default when None. Every block is
                run once, beside its formula, on as many rows as it would get from them.
            settled: fold what is trained of the backbone too, as it is now, without a gradient;
                otherwise the plan's `now()` puts it in, with one.

        Raises:
            UnsupportedBackbone: naming what the blocks do that a plan does not: hooks on a block or
                a part of it, a replaced forward, a matrix or LayerScale that requires a gradient,
                dropout in training mode, or a formula that cannot be folded; or that the call is
                inside a torch.func transform, forward-mode differentiation, tracing or export.
        """
        self._check_read()
        dtype = wanted_dtype(self.view.like) if dtype is None else dtype
        plans = self._plans
        if plans is None or not plans.current():
            plans = self._plans = Plans(self.view)
        size = self.view.default_size if size is None else size
        lengths = sequence_lengths(self.prompts, self.view.num_rows(size))
        return plans.plan(dtype, lengths, size, settled)

    def drop_plans(self) -> None:
        """Forget all folded copies of the backbone; the next fast forward folds again."""
        self._plans = None

    def trained_state(self) -> dict[str, Tensor]:
        """What training changes, by name: prompts, KLD, head, and of the backbone what is trained.

        Raises:
            ValueError: a parameter of the backbone requires a gradient and was not named.
        """
        self._refuse_unnamed("what is trained")
        state, own = self.state_dict(), self._trained_backbone()
        return {k: v for k, v in state.items() if not k.startswith("backbone.") or k in own}

    def save(
        self,
        path: str | Path,
        extra: Mapping[str, str] | None = None,
        task: TaskInfo | None = None,
    ) -> None:
        """Write the trained parts to a safetensors file, atomically, with the backbone's name,
        fingerprint and image size, the versions that wrote it, and a digest of all.

        Args:
            path: file to write; an existing one is replaced only when the new one is complete.
            extra: further strings for the file's metadata.
            task: what the model was trained for: classes, and how images become its input; None:
                `self.task`.

        Raises:
            ValueError: a trained tensor holds NaN or infinity (the file could not be loaded); other
                classes than the head has; metadata that is no text; a parameter of the backbone
                that requires a gradient and was not named.
            OSError: naming `path`.
        """
        checkpoint.save(self, path, extra, task)

    def load(self, path: str | Path, other_size: bool = False) -> PromptedViT:
        """Read trained parts written by `save` into this model: all of them, or none on an error.

        Args:
            path: the file. `pae.read_checkpoint` tells what it holds.
            other_size: take it also when it was trained on the same weights with another position
                embedding, which is what another image size makes.

        Raises:
            CheckpointError: unreadable, incomplete or damaged file, another backbone or image size,
                or parts that do not fit.
        """
        checkpoint.load(self, path, other_size)
        return self

    @classmethod
    def from_file(
        cls, path: str | Path, backbone: nn.Module, other_size: bool = False
    ) -> PromptedViT:
        """Build the model that `save` wrote on top of `backbone`, prompt family and KLD included.

        On an error the backbone is as it was.

        Args:
            path, other_size: as in `load`.
            backbone: as for the constructor; its weights are those the file was trained on.

        Raises:
            CheckpointError: as in `load`.
            UnsupportedBackbone, TypeError: as the constructor.
        """
        return checkpoint.build(cls, path, backbone, other_size)

    def __getstate__(self) -> dict:
        # copies and pickles carry no folded plans: those belong to the original's weights
        return {**self.__dict__, "_plans": None}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        trained.hold(self.backbone, self.trained_backbone)
        _models.setdefault(self.backbone, weakref.WeakSet()).add(self)


def fast_forward(model: nn.Module, images: Tensor, memory: str = "keep") -> Tensor:
    """model(images), in value and in every gradient, without the work that is thrown away.

    Args:
        model: a `PromptedViT` or `PromptedCLIP`, or a wrapper around one that forwards calls
            (DistributedDataParallel, torch.compile).
        images: (B, C, H, W) float, normalised as the backbone wants it; of a backbone that reads
            clips (B, T, C, H, W).
        memory: what a middle block keeps for the backward, per image, with S = N D elements:
            "keep": 10 S. No extra work.
            "recompute8": 3 S and 8-bit derivatives of the activation (4 S bytes). q, k, v are
            computed again, one eighth more product work; approximate, by as much as the table of
            docs/numbers.md says. With a gated MLP, or a norm inside it, as "recompute".
            "recompute": 3 S. q, k, v and the MLP's hidden rows are computed again, a third more
            product work; exact.
            "packed": as "keep", and on a CPU in fp32 with MKL every weight is held twice more, in
            the order in which MKL multiplies by it forward and backward, as long as the number of
            rows stays. Worth it for a few images a step.

    Returns:
        logits (B, classes).

    Raises:
        TypeError: `model` holds neither.
        ValueError: images of a wrong shape, size or dtype; an unknown memory mode.
        UnsupportedBackbone: the backbone is not frozen, is hooked, or was changed into something
            that cannot be folded; see `PromptedViT.plan`.
    """
    inner = model
    while not getattr(type(inner), "runs_fast", False):
        wrapped = getattr(inner, "module", getattr(inner, "_orig_mod", None))
        if not isinstance(wrapped, nn.Module):
            raise TypeError(
                "model must be a PromptedViT or PromptedCLIP, or wrap one, got "
                f"{type(model).__name__}"
            )
        inner = wrapped
    return model(images, engine="fast", memory=memory)


def blocks_of(name: str, blocks: Sequence[int], depth: int) -> tuple[int, ...]:
    """Numbers of blocks in [0, depth), negative ones counted from the end, or raise ValueError
    unless they are ascending.
    """
    given = list(blocks) if isinstance(blocks, Iterable) and not isinstance(blocks, str) else None
    if not given or any(type(block) is not int for block in given):
        raise ValueError(f"{name} must be numbers of blocks, got {blocks!r}")
    if wrong := [block for block in given if not -depth <= block < depth]:
        raise ValueError(f"{name} must lie in [{-depth}, {depth}), got {wrong[0]}")
    found = tuple(block % depth for block in given)
    if any(a >= b for a, b in pairwise(found)):
        kind = "each once" if len(set(found)) < len(found) else "ascending"
        raise ValueError(f"{name} must be {kind}, got {given}")
    return found


def _ask_the_rest(family: PromptFamily, index: int, x: Tensor) -> None:
    """Prompts behind block `index`, which nobody reads: where the fast engine asks for all at once
    their dropout is drawn, and both engines leave the same random stream.
    """
    if family.depends_on_input or family.enters_sequence:
        return
    for i in range(index + 1, len(family.prompt_counts)):
        family.block_prompts(i, x)
        family.head_keys_values(i, x)


def check_pool(pool: str, view: BackboneView, prompts: PromptFamily) -> None:
    """Raise unless backbone and prompts have the rows that `pool` says."""
    if check_choice("pool", pool, POOLS) == "image":
        return
    if instead := view.pools_not:
        more = "; pae.backbones.average_pooled makes it read the mean of its rows"
        more = more if hasattr(view.module, "global_pool") else ""  # timm's
        raise ValueError(
            f"pool must be 'image' for a backbone whose readout {instead}, got {pool!r}{more}"
        )
    count = prompts.prompt_counts[0 if prompts.enters_sequence else -1]
    if pool == "prompts" and (prompts.moves_prompts or count == 0):
        why = "may leave the last block none" if prompts.moves_prompts else "has none there"
        raise ValueError(
            "pool must be 'image' or 'all' unless there are prompts in the last block: prompts "
            f"({type(prompts).__name__}) {why}, got 'prompts'"
        )


def _check_alone(backbone: nn.Module, trained_here: Sequence[str]) -> None:
    """Raise where two models that live would share what one of them trains: either would change
    under the other, and this one's constructor freezes it.
    """

    def found() -> str | None:
        others = list(_models.get(backbone, ()))
        elsewhere = [name for other in others for name in other.trained_backbone]
        if elsewhere:
            return f"another PromptedViT trains {elsewhere[0]} of it"
        here = f"this one is to train {trained_here[0]} of it" if trained_here else None
        return here if others else None

    if found() is None:
        return
    gc.collect()  # of models that nobody has any more
    if why := found():
        raise ValueError(
            f"backbone belongs to another PromptedViT, and {why}: give this model a copy "
            "(copy.deepcopy(backbone)), or delete the other first"
        )


def _check_heads(view: BackboneView, prompts: PromptFamily) -> None:
    """Raise where keys and values per head have not one shape for all blocks."""
    if view.unproved is None:
        blocks = [view.read_block(i) for i in range(view.shape.depth)]
        if len(found := {(w.num_heads, w.head_width) for w in blocks}) > 1:
            raise ValueError(
                f"prompts ({type(prompts).__name__}) gives keys and values per head, and the "
                f"backbone's blocks have different heads (number, width): {sorted(found)}"
            )


def _new_head(width: int, classes: int) -> nn.Linear:
    """Linear head as VPT initialises it: Kaiming normal (fan out), bias -log(99)."""
    head = nn.Linear(width, classes)
    nn.init.kaiming_normal_(head.weight, a=0, mode="fan_out")
    nn.init.constant_(head.bias, -math.log(99.0))
    return head
