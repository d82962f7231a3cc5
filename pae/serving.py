"""Many tasks on one frozen backbone in one batch: every image with the prompts and the head of its
own task.

The backbone runs once over the whole batch. Prompts of all tasks are prompt sets of the attention,
picked per image by a group index; their keys and values are constants and are formed once. Heads
are one product, of whose columns each image takes those of its task. Nothing follows: sums and
activations happen in place, and on a CPU in fp32 the blocks' weights are laid out once for products
of as many images as run at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbones.facts import difference, facts_of
from .block import Keys, Stream, forward, keys_values, normalise
from .checkpoint import fingerprint, position_fingerprint
from .engine import BlockPrompts, walk
from .inference import InPlace
from .model import PromptedViT
from .plan import FrozenPlan
from .prompts import PromptFamily
from .sequence import pooled_rows

# of a row that only fills up a smaller set; finite, so that no kernel subtracts infinities
_ABSENT = -1e30
# images at a time on a CPU, where rows of more fall out of the caches between two products
_ON_CPU = 8


class Served(nn.Module):
    """Prompted models of one backbone, asked together; see `pae.serve_many`.

    Args:
        models: at least one, with the same backbone (the same module, or one with the same
            weights). They are put into eval mode, and the first one's backbone is the one that
            runs; what they have learned is copied, so later changes to them count nothing.

    Attributes:
        classes: per task the names of its classes, or None where they are not known.
        transforms: per task what `pae.load` gave, or None.

    Raises:
        ValueError: naming the number of the task: another backbone, or what cannot be shared:
            prompts that depend on images (VAPT), live in the sequence (VPT-shallow, LSPT), change
            rows (iVPT) or come as keys and values (E2VPT, APT); a trained part of the backbone; a
            pool other than "image"; a head that is no linear layer; a backbone in windows (Swin).
    """

    weight: Tensor
    bias: Tensor
    columns: Tensor

    def __init__(self, models: Sequence[PromptedViT]) -> None:
        super().__init__()
        models = list(models)
        if not models:
            raise ValueError("models must be at least one, got none")
        self.first = models[0].eval()
        for number, model in enumerate(models):
            _check(number, model, self.first)
        self.classes = [model.classes for model in models]
        self.transforms = [model.transform for model in models]
        self._set_prompts(models)
        heads = [model.head for model in models]
        self.register_buffer("weight", torch.cat([_weight(head) for head in heads]))
        self.register_buffer("bias", torch.cat([_bias(head) for head in heads]))
        counts = [len(_weight(head)) for head in heads]
        # columns of each task among those of all; behind the last one stands -inf
        columns = torch.full((len(models), max(counts)), sum(counts))
        for number, count in enumerate(counts):
            columns[number, :count] = torch.arange(count) + sum(counts[:number])
        self.register_buffer("columns", columns.to(self.first.device))
        # and the version of each set
        self._known: tuple[FrozenPlan, list[BlockPrompts], list[InPlace], list[int]] | None = None

    @property
    def num_tasks(self) -> int:
        """Number of tasks."""
        return len(self.classes)

    @torch.no_grad()
    def _set_prompts(self, models: list[PromptedViT]) -> None:
        shape, like = self.first.view.shape, self.first.view.like
        x = like.new_zeros(1, shape.num_tokens, shape.width)
        given = []
        for model in models:
            model.prompts.start_forward()
            given.append([model.prompts.block_prompts(i, x) for i in range(shape.depth)])
        for i in range(shape.depth):
            sets = [x[0, :0] if (own := rows[i]) is None else own for rows in given]
            most = max(len(rows) for rows in sets)
            filled = [torch.cat([r, r.new_zeros(most - len(r), r.shape[-1])]) for r in sets]
            wide = torch.promote_types(like.dtype, torch.float32)
            absent = torch.zeros(len(sets), most, dtype=wide, device=like.device)
            for row, rows in zip(absent, sets):
                row[len(rows) :] = _ABSENT
            self.register_buffer(f"rows_{i}", torch.stack(filled) if most else None)
            ragged = any(len(rows) < most for rows in sets)
            self.register_buffer(f"absent_{i}", absent if ragged else None)

    def _of(self, plan: FrozenPlan) -> tuple[list[BlockPrompts], list[InPlace]]:
        """Per block the sets of all tasks, with the keys and values that `plan` gives them, and how
        it is run.
        """
        known = self._known  # another thread may put its own there at any time
        sets = [getattr(self, f"rows_{i}") for i in range(len(plan.blocks))]
        versions = [0 if r is None or r.is_inference() else r._version for r in sets]
        if (
            known is None
            or known[0] is not plan
            or known[3] != versions
            or any(prompts.rows is not rows for prompts, rows in zip(known[1], sets))
        ):
            found = []
            for i, (block, rows) in enumerate(zip(plan.now().blocks, sets)):
                kv = None
                if rows is not None:
                    kv = keys_values(block, normalise(rows, block.norm1, plan.dtype))
                found.append(BlockPrompts(rows, None, getattr(self, f"absent_{i}"), kv=kv))
            known = self._known = plan, found, [InPlace() for _ in found], versions
        return known[1:3]

    def __getstate__(self) -> dict:
        # as of a PromptedViT: copies form their own
        return {**self.__dict__, "_known": None}

    @torch.no_grad()
    def forward(self, images: Tensor, tasks: Tensor | Sequence[int]) -> Tensor:
        """Logits (B, C) of images (B, C_in, H, W), C the largest number of classes of a task.

        Args:
            images: normalised as the backbone wants it; tasks with another normalisation bring
                their own transform.
            tasks: (B,), the number of each image's task in the order of the models.

        Returns:
            Behind the classes of an image's own task stands -inf, so that softmax and argmax are
            those of the task. Equal to the models', one by one, up to rounding; no gradient.

        Raises:
            ValueError: another number of tasks than images, or one that is not there (on a GPU,
                where looking would mean waiting, an error of the device); images as in
                `PromptedViT.forward`.
            UnsupportedBackbone: the backbone cannot be folded, see `PromptedViT.plan`.
        """
        view = self.first.view
        view.check_images(images)
        on_cpu = not isinstance(tasks, Tensor) or tasks.device.type == "cpu"
        group = torch.as_tensor(tasks)
        if group.shape != images.shape[:1]:
            raise ValueError(
                f"tasks must be one per image, {len(images)}, got {tuple(group.shape)}"
            )
        if not len(group):
            group = group.long()  # of an empty list it is not said
        if group.dtype.is_floating_point or group.dtype == torch.bool:
            raise ValueError(f"tasks must be integers, got {group.dtype}")
        if (
            on_cpu
            and group.numel()
            and not 0 <= int(group.min()) <= int(group.max()) < len(self.columns)
        ):
            raise ValueError(
                f"tasks must be from 0 to {self.num_tasks - 1}, got {int(group.min())} to "
                f"{int(group.max())}"
            )
        group = group.to(images.device, torch.int64)
        if images.device.type == "cpu" and len(images) > _ON_CPU:
            pairs = zip(images.split(_ON_CPU), group.split(_ON_CPU))
            return torch.cat([self._logits(*pair) for pair in pairs])
        return self._logits(images, group)

    def _logits(self, images: Tensor, group: Tensor) -> Tensor:
        view = self.first.view
        height, width = images.shape[-2:]
        plan = self.first.plan(size=(height, width))
        x = view.embed(images)
        with torch.autocast(x.device.type, enabled=False):
            known, steps = self._of(plan)
            known = [p if p.rows is None else p._replace(group=group) for p in known]
            now, last = plan.now(), len(known) - 1
            stream = Stream(x.contiguous())
            for block, prompts, how in zip(now.blocks[:last], known, steps):
                if x.device.type == "cpu" and len(x) == _ON_CPU:  # others run as the weights lie
                    how.lay_out(block, x.shape[:2].numel())
                keys = None
                if prompts.kv is not None:
                    keys = Keys(prompts.kv, prompts.group, prompts.log_multiplicity)
                stream = forward(block, stream, keys, how)
            rows = walk(
                now.only(last, last + 1),
                stream.sum(),
                lambda _, stream: (stream, known[last]),
                plan.class_only,
            )
        if not plan.class_only:
            rows = pooled_rows(rows, view.num_prefix_tokens, 0, "image")
        logits = F.linear(view.readout(rows), self.weight, self.bias)
        logits = F.pad(logits, (0, 1), value=float("-inf"))
        return logits.gather(1, self.columns[group])


def _check(number: int, model: PromptedViT, first: PromptedViT) -> None:
    who = f"task {number}"
    if not isinstance(model, PromptedViT):
        raise ValueError(f"{who} must be a PromptedViT, got {type(model).__name__}")
    if model.view.shape.widths:
        raise ValueError(f"{who}: its backbone works in windows (Swin), which have no prompt sets")
    family, base = model.eval().prompts, PromptFamily
    name = type(family).__name__
    reasons = {
        "depend on the images": family.depends_on_input,
        "live in the sequence": family.enters_sequence,
        "change the image's rows": family.adjusts_rows or family.reads_class_attention,
        "change what attention gives": family.bypasses_attention,
        "come as keys and values": type(family).head_keys_values is not base.head_keys_values,
        "are sets already": type(family).group_index is not base.group_index,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"{who}: prompts of {name} {reason}, so they cannot be prompt sets")
    if model.trained_backbone:
        raise ValueError(f"{who}: {model.trained_backbone[0]} of its backbone was trained")
    if model.pool != "image":
        raise ValueError(f"{who}: pool must be 'image', got {model.pool!r}")
    if not isinstance(model.head, nn.Linear):
        raise ValueError(f"{who}: its head must be nn.Linear, got {type(model.head).__name__}")
    if model.backbone is first.backbone:
        return
    own, other = model.backbone, first.backbone
    same = fingerprint(own) == fingerprint(other)
    if not same or position_fingerprint(own) != position_fingerprint(other):
        raise ValueError(f"{who} has another backbone than task 0")
    if what := difference(facts_of(model.view), facts_of(first.view)):
        raise ValueError(f"{who} has the weights of task 0's backbone with {what}")


def _weight(head: nn.Module) -> Tensor:
    return cast(nn.Linear, head).weight.detach()


def _bias(head: nn.Module) -> Tensor:
    bias, weight = cast(nn.Linear, head).bias, _weight(head)
    return weight.new_zeros(len(weight)) if bias is None else bias.detach()
