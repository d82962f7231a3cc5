"""Two towers, one model: an image tower with prompts and a text tower with learned context.

    logits = exp(logit_scale) normalise(image features) normalise(text features)^T + logit_bias

Nothing is trained but prompts and context (and what a `PromptedViT` trains beside them); there is
no head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import clip_file
from .backbones.clip_text import TextView, read_text
from .backbones.view import BackboneView, Bypass, added_to
from .choices import ENGINES
from .clip_tokens import count_of, name_lengths_of, places_of, template_of, tokenised
from .engine import check_memory
from .kld import KLD
from .model import PromptedViT, uncompiled
from .plan import BOOKKEEPING, FrozenPlan, Plans, wanted_dtype
from .prompts import PromptFamily, VPTDeep
from .prompts.base import check_choice
from .prompts.text_context import POSITIONS
from .sequence import asked
from .task import TaskInfo
from .text import Constants, Layout, constants, groups_of, walk

if TYPE_CHECKING:
    from .mpa import MPAResult


class PromptedText(nn.Module):
    """A frozen text tower with learned rows in front of the names of classes.

    The sequences are [start, context rows, class name, the rest, end token, padding]: context rows
    stand in the place of place-holder tokens and get their positions. The tower is taken over:
    frozen, kept in eval mode.

    Args:
        text: a model with a text tower, see `pae.backbones.clip_text.read_text`, or its view.
        context: what the learned rows come from, unused before: `pae.prompts.TextContext`, or a
            module with `num_tokens` (n), `position` ("end": all rows in front of the class name;
            "middle": n // 2 of them, the others behind it), `bind(width, depth)`, and `rows()`,
            which gives (n, D), or (C, n, D) where classes have their own. It may have
            `attention_bypass(index, h, y)`, which both engines ask as that of a `PromptFamily`, of
            texts' rows (C, n, D), and `start_forward()`, called before features are computed.
            None: no learned rows.
        tokens: int64 (C, N), one text per class, padded as the tower is used to, with n
            place-holders behind the start token, whatever the position.
        name_lengths: for "middle": how many tokens each class name has, which stands right behind
            the place-holders.

    Attributes:
        view: what pae reads of the tower. backbone: the tower's own modules and parameters.
        context: as given. tokens: (C, N), the place-holders where the context's rows go.
        live: (C, n), where those are. ends: (C,), the row that each text is read at.

    Raises:
        UnsupportedBackbone: the tower is none that is read.
        TypeError, ValueError: naming the argument, what it was and what was expected.
    """

    tokens: Tensor
    live: Tensor
    ends: Tensor
    context: Any
    _plans: Plans | None
    _first: tuple[list[Any], Constants] | None
    _kept: tuple[list[Any], Tensor, int] | None
    _grouped: tuple[Any, Any] | None

    def __init__(
        self,
        text: nn.Module | TextView,
        context: nn.Module | None,
        tokens: Tensor,
        name_lengths: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.view = view = read_text(text)
        view.check_tokens(tokens)
        count = 0 if context is None else count_of(context)
        position = "end" if context is None else getattr(context, "position", "")
        check_choice("context.position", position, POSITIONS)
        like = view.like
        tokens = tokens.to(like.device)
        ends = view.eot(tokens)
        lengths = name_lengths_of(position, count, name_lengths, len(tokens))
        least = view.starts + count + torch.tensor(lengths, device=like.device)
        if bool((short := ends < least).any()):
            at = int(short.int().argmax())
            raise ValueError(
                f"tokens[{at}] ends at row {int(ends[at])}, expected a class name behind "
                f"{view.starts + count} rows, and an end token at row {int(least[at])} or later"
            )
        live, tokens = places_of(
            tokens, view.starts, count, lengths if position == "middle" else None
        )
        self.context = context
        if context is not None:
            self.context.bind(view.shape.width, view.shape.depth)
            self.context.to(like.device, like.dtype)
        self.backbone = view.module.requires_grad_(False).eval()
        for name, buffer in (("tokens", tokens), ("live", live), ("ends", ends)):
            self.register_buffer(name, buffer, persistent=False)
        self._layout = Layout.of(tokens, live, ends, view.causal)
        self._pair: tuple[nn.Module, ...] = ()  # in a tuple: no part of this module
        self.drop_plans()

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.tokens)

    def train(self, mode: bool = True) -> PromptedText:
        """Training mode for the context; the tower always stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def rows(self) -> Tensor | None:
        """The context's rows (n, D), or (C, n, D), in the tower's dtype; None without any."""
        if self.context is None or self.live.shape[1] == 0:
            return None
        rows = self.context.rows()
        (classes, count), width = self.live.shape, self.view.shape.width
        if tuple(rows.shape) not in ((count, width), (classes, count, width)):
            raise ValueError(
                f"context.rows() must be ({count}, {width}) or ({classes}, {count}, {width}), got "
                f"{tuple(rows.shape)}"
            )
        return rows.to(self.view.like.dtype)

    def embed(self) -> Tensor:
        """What enters the first block, (C, N, D), the context's rows in their places."""
        rows = self.rows()
        return self._embed(rows, slice(None), slice(0, self.tokens.shape[1]), slice(None))

    def _embed(
        self, rows: Tensor | None, classes: slice | Tensor, part: slice, learned: slice
    ) -> Tensor:
        """Rows `part` of these classes, with those `learned` of the context's rows in them."""
        x = self.view.tokens(self.tokens[classes, part])
        at = self.live[classes, learned, None] - part.start
        if rows is not None and at.shape[1]:
            at = at.expand(-1, -1, x.shape[-1])
            rows = rows[classes] if rows.dim() == 3 else rows
            x = x.scatter(1, at, rows[..., learned, :].expand(at.shape))
        return self.view.place(x, part.start)

    def forward(self, engine: str = "reference", memory: str = "keep") -> Tensor:
        """Text features (C, E) of unit length, in at least fp32.

        What cannot change is computed once: features without learned rows, and in eval mode those
        that are asked for without a gradient, are kept until a parameter, a buffer or an attribute
        of tower, context or pair is replaced, moved or written in place. Writes through `.data`
        leave no trace that PyTorch records: call `drop_plans` after those.

        Args:
            engine: "reference" runs the tower's own blocks on all rows, "fast" what `pae.text`
                says.
            memory: for "fast", see `pae.fast_forward`.

        Raises:
            ValueError: an unknown engine or memory mode, or rows of another shape.
            UnsupportedBackbone: from "fast", as `PromptedViT.plan`.
        """
        check_choice("engine", engine, ENGINES)
        check_memory(memory)
        if not self._is_constant():
            return self._features(engine, memory)
        state = self._state(engine)
        if state is None:
            return self._features(engine, memory)
        kept = self._kept
        if kept is None or kept[1]._version != kept[2] or not _unchanged(kept[0], state):
            with torch.inference_mode(False), torch.no_grad():
                found = self._features(engine, memory)
            kept = self._kept = state, found, found._version
        return kept[1]

    def _features(self, engine: str, memory: str) -> Tensor:
        if hasattr(self.context, "start_forward"):
            self.context.start_forward()
        if engine == "reference":
            return _unit(self.view.read_rows(self.embed(), self.ends, self._bypasses()))
        return _unit(self.view.readout(self._fast_rows(memory)))

    def _fast_rows(self, memory: str) -> Tensor:
        """The rows at which texts are read, (C, D), behind the last block."""
        plan, rows = self.plan(), self.rows()
        layout = self._layout
        if rows is not None and rows.dim() == 3:
            layout = layout.of_own_rows()
        if bypasses := self._bypasses():
            layout = layout.of_changed_attention()
        start, end = layout.constant, layout.shared
        in_front, behind = slice(0, layout.learned), slice(layout.learned, None)
        groups, order = self._groups()
        own, at = [], []
        with _no_autocast(self.tokens.device):
            known = self._constants(plan, start)
            shared = self._embed(rows, slice(0, 1), slice(start, end), in_front)
            for classes, length in groups:
                own.append(self._embed(rows, classes, slice(end, length), behind))
                at.append(self.ends[classes] - end)
            found = walk(plan, known, shared, own, at, memory, bypasses)
            return found[0] if order is None else torch.cat(found)[order]

    def _bypasses(self) -> list[Bypass]:
        """Of every block; empty where the context does not change what attention gives."""
        if not hasattr(self.context, "attention_bypass"):
            return []
        return [asked(self.context, i) for i in range(self.view.shape.depth)]

    @uncompiled
    def _groups(self) -> tuple[list[tuple[Any, int]], Tensor | None]:
        """The classes in groups that run together, and how many rows each group has; where each
        class is among those of all groups, None where they are in order.
        """
        device, grouped = self.tokens.device, self._grouped
        if grouped is None or grouped[0] != device:
            lengths = self._layout.lengths
            groups = groups_of(lengths, device.type)
            if len(groups) == 1:
                made: Any = [(slice(None), max(lengths))], None
            else:
                indices = [torch.tensor(group, device=device) for group in groups]
                longest = [max(lengths[i] for i in group) for group in groups]
                made = list(zip(indices, longest)), torch.cat(indices).argsort()
            grouped = self._grouped = device, made
        return grouped[1]

    @uncompiled
    def plan(self, dtype: torch.dtype | None = None) -> FrozenPlan:
        """The folded tower for products in `dtype` (autocast's dtype, else the tower's, when None);
        kept and refused as `PromptedViT.plan`.
        """
        dtype = wanted_dtype(self.view.like) if dtype is None else dtype
        plans = self._plans  # another thread may put its own there at any time
        if plans is None or not plans.current():
            plans = self._plans = Plans(self.view)
            self._first = None
        lengths = (max(self._layout.lengths),) * self.view.shape.depth
        return plans.plan(dtype, lengths, (0, 0))

    @uncompiled
    def _constants(self, plan: FrozenPlan, count: int) -> Constants:
        """Of the first `count` rows."""
        tables = self.view.table.weight, self.view.positions
        state = [plan, count, *map(_version, tables)]
        first = self._first
        if first is None or not _unchanged(first[0], state):
            x = self._embed(None, slice(0, 1), slice(0, count), slice(0, 0))
            first = self._first = state, constants(plan, x)
        return first[1]

    def drop_plans(self) -> None:
        """Forget the folded tower and the features that were kept."""
        self._plans = self._first = self._kept = self._grouped = None

    def _is_constant(self) -> bool:
        """Whether features are the same until something is written."""
        tower = self.backbone.parameters()
        if torch.compiler.is_compiling() or any(p.requires_grad for p in tower):
            return False
        if self.context is None:
            return True
        parameters = (p for part in self._sources() for p in part.parameters())
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
        return not self.training and not trains

    def _sources(self) -> list[nn.Module]:
        """Whose parameters the context's rows are made of."""
        return [part for part in (self.context, *self._pair) if part is not None]

    def _state(self, engine: str) -> list[Any] | None:
        """All that features follow from; None where that cannot be known."""
        found = [engine, self.tokens.device, wanted_dtype(self.view.like)]
        found += map(_version, (self.tokens, self.live, self.ends))
        for module in (m for part in (self.backbone, *self._sources()) for m in part.modules()):
            if added_to(module):
                return None
            own = vars(module)
            found += [type(module), type(module).forward]
            found += [value for name, value in own.items() if name not in BOOKKEEPING]
            for tensor in (*own["_parameters"].values(), *own["_buffers"].values()):
                if tensor is not None and tensor.is_inference():
                    return None
                found.append(_version(tensor))
        return found

    def __getstate__(self) -> dict[str, Any]:
        # copies carry no folded plans and no features: those belong to the original's weights
        return {**self.__dict__, "_plans": None, "_first": None, "_kept": None, "_grouped": None}


class PromptedCLIP(nn.Module):
    """An image tower and a text tower that share a space of features.

    Args:
        vision: its head, which maps to the space of the text's features, is frozen: CLIP's image
            projection, or an identity.
        text: the classes.
        logit_scale: logarithm of the scores' factor, a number or a tensor of one; frozen.
        logit_bias: added to the scores (SigLIP's), frozen; or None.
        pair: what made the prompts of both, where they belong together: a module with `image` (the
            family of `vision`) and `text` (the context of `text`); it may have
            `see_features(image_features, text_features, labels)`, which `loss` calls in training,
            and `penalty()`.
        class_names: names in the order of the texts; kept in files.

    Attributes:
        vision, text, pair: the parts. logit_scale, logit_bias: buffers. class_names: a tuple, or
            None. template: the text of a class with {} for its name, where it is known. task: what
            it is trained for, or None; transform: set by `pae.load`; see `PromptedViT`.

    Raises:
        TypeError, ValueError: on parts of a wrong type, or that do not go together.
    """

    runs_fast = True  # what `pae.fast_forward` looks for
    logit_scale: Tensor
    logit_bias: Tensor | None
    pair: Any
    template: str | None = None
    task: TaskInfo | None = None
    transform: Callable[[Any], Tensor] | None = None

    def __init__(
        self,
        vision: PromptedViT,
        text: PromptedText,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        pair: nn.Module | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(vision, PromptedViT):
            raise TypeError(f"vision must be a PromptedViT, got {type(vision).__name__}")
        if not isinstance(text, PromptedText):
            raise TypeError(f"text must be a PromptedText, got {type(text).__name__}")
        if pair is not None and (
            getattr(pair, "image", None) is not vision.prompts
            or getattr(pair, "text", None) is not text.context
        ):
            raise ValueError("pair.image and pair.text must be the prompts of vision and text")
        names = None if class_names is None else tuple(class_names)
        if names is not None and len(names) != text.num_classes:
            raise ValueError(
                f"class_names must be {text.num_classes} like the texts, got {len(names)}"
            )
        wide, own = text.view.shape.feature_width, _width_of(vision)
        if own != wide:
            raise ValueError(
                f"vision must give features of the text's width, {wide}, got {own}: its head must "
                "be CLIP's image projection"
            )
        self.vision, self.text, self.pair, self.class_names = vision, text, pair, names
        vision.head.requires_grad_(False)
        if pair is not None:
            text._pair = (pair,)
            pair.to(vision.device, vision.view.like.dtype)
        for name, value in (("logit_scale", logit_scale), ("logit_bias", logit_bias)):
            self.register_buffer(name, None if value is None else _scalar(name, value, vision))

    @property
    def num_classes(self) -> int:
        """C."""
        return self.text.num_classes

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Their names, in the order of the logits, where they are known."""
        return self.class_names

    @property
    def prompts(self) -> PromptFamily:
        """Of the image tower."""
        return self.vision.prompts

    @property
    def backbone(self) -> Any:
        """Of the image tower."""
        return self.vision.backbone

    @property
    def view(self) -> BackboneView:
        """Of the image tower."""
        return self.vision.view

    @property
    def device(self) -> torch.device:
        """Of the towers."""
        return self.vision.device

    def features(self, images: Tensor, engine: str = "reference", memory: str = "keep") -> Tensor:
        """Image features (B, E) of unit length, in at least fp32; arguments and errors as those of
        `PromptedViT.forward`.
        """
        return _unit(self.vision(images, engine, memory))

    def text_features(self, engine: str = "reference", memory: str = "keep") -> Tensor:
        """Text features (C, E) of unit length; arguments and errors as those of `PromptedText`'s
        forward.
        """
        return self.text(engine, memory)

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Scores (B, C) of unit features, in at least fp32."""
        return _scores(image_features, text_features, self.logit_scale, self.logit_bias)

    def forward(self, images: Tensor, engine: str = "reference", memory: str = "keep") -> Tensor:
        """Logits (B, C) of images (B, 3, H, W).

        Args:
            engine: "reference" runs the towers' own blocks; "fast" is `pae.fast_forward`.
            memory: of the image tower, see `pae.fast_forward`.

        Raises:
            ValueError, UnsupportedBackbone: as `PromptedViT.forward`.
        """
        return self.logits(
            self.features(images, engine, memory), self.text_features(engine, memory)
        )

    def loss(
        self, images: Tensor, labels: Tensor, engine: str = "reference", memory: str = "keep"
    ) -> Tensor:
        """Scalar to minimise: cross-entropy of the logits and `penalty`, after the family has seen
        the labels and the pair the features.

        Args:
            labels: (B,) int64 in [0, C).
            images, engine, memory: as in `forward`.
        """
        if self.training:
            self.vision.prompts.see_labels(labels)
        found, texts = self.features(images, engine, memory), self.text_features(engine, memory)
        if self.training and hasattr(self.pair, "see_features"):
            self.pair.see_features(found, texts, labels)
        return F.cross_entropy(self.logits(found, texts), labels) + self.penalty()

    def penalty(self) -> Tensor:
        """Scalar to add to the training loss: that of `vision`, and the pair's own; 0 in eval
        mode.
        """
        total = self.vision.penalty()
        own = getattr(self.pair, "penalty", None)
        if not self.training or own is None:
            return total
        found = own()
        return total if found is None else total + found

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict]:
        """Trainable parameters as torch.optim takes them: "prompts", "kld" and "backbone" of the
        image tower (see `PromptedViT.parameter_groups`), "text" (the context's) and "pair" (what
        it has besides); empty groups are left out.

        Raises:
            ValueError: as `PromptedViT.parameter_groups`.
        """
        heads = ("head", "head_bias")  # the projection, which is frozen
        groups = self.vision.parameter_groups(lr, weight_decay)
        groups = [group for group in groups if group["name"] not in heads]
        seen = {id(p) for group in groups for p in group["params"]}
        for name, part in (("text", self.text.context), ("pair", self.pair)):
            own = [] if part is None else [p for p in part.parameters() if id(p) not in seen]
            seen |= {id(p) for p in own}
            if own:
                group = {"name": name, "params": own, "lr": lr, "weight_decay": weight_decay}
                groups.append(group)
        return groups

    def mpa_init(
        self, images: Tensor | Iterable, labels: Tensor | None = None, **options: Any
    ) -> MPAResult:
        """`pae.mpa_init` of the image prompts; its head is the contrast with the texts' features as
        they are now, as for every batch.

        Args:
            images, labels, options: as in `pae.mpa_init`; labels in [0, C).

        Raises:
            TypeError, ValueError: as `pae.mpa_init`.
        """
        from .mpa import mpa_init

        training, head = self.text.training, self.vision.head
        try:
            self.text.eval()
            with torch.no_grad():
                self.vision.head = _Contrast(self, head, self.text_features("fast"))
            return mpa_init(self.vision, images, labels, **options)
        finally:
            self.vision.head = head
            self.text.train(training)

    @torch.no_grad()
    def classifier(self) -> nn.Module:
        """The image tower with the texts' features as they are now, without gradient: a module of
        images (B, 3, H, W) to logits (B, C) that holds no text tower.
        """
        texts = self.text_features().clone()
        return _Classifier(self.vision, _Contrast(self, nn.Identity(), texts))

    def drop_plans(self) -> None:
        """Forget the folded towers and the text features that were kept."""
        self.vision.drop_plans()
        self.text.drop_plans()

    def trained_state(self) -> dict[str, Tensor]:
        """What training changes, by name: prompts, context, what the pair has besides, KLD, and of
        the image tower what is trained.
        """
        state = {f"vision.{name}": t for name, t in self.vision.trained_state().items()}
        state = {name: t for name, t in state.items() if not name.startswith("vision.head.")}
        parts = [("text.context", self.text.context, ()), ("pair", self.pair, ("image.", "text."))]
        for name, part, shared in parts:
            own = {} if part is None else part.state_dict()
            state |= {f"{name}.{n}": t for n, t in own.items() if not n.startswith(shared)}
        return state

    def save(
        self,
        path: str | Path,
        extra: Mapping[str, str] | None = None,
        task: TaskInfo | None = None,
    ) -> None:
        """Write the trained parts to a safetensors file, atomically, with fingerprints of both
        towers, the names of the classes, and a digest of all.

        Args:
            path, extra, task: as in `PromptedViT.save`.

        Raises:
            ValueError, OSError: as `PromptedViT.save`.
        """
        clip_file.save(self, path, extra, task)

    def load(self, path: str | Path, other_classes: bool = False) -> PromptedCLIP:
        """Read trained parts written by `save` into this model: all of them, or none on an error.

        Args:
            path: the file.
            other_classes: take it also when it was trained on other classes than the model's.

        Raises:
            CheckpointError: unreadable, incomplete or damaged file, other towers or classes, or
                parts that do not fit.
        """
        clip_file.load(self, path, other_classes)
        return self


class _Contrast(nn.Module):
    """A head that scores features against texts."""

    logit_scale: Tensor
    logit_bias: Tensor | None
    texts: Tensor

    def __init__(self, model: PromptedCLIP, projection: nn.Module, texts: Tensor) -> None:
        super().__init__()
        self.projection, self.out_features = projection, len(texts)
        own = {"logit_scale": model.logit_scale, "logit_bias": model.logit_bias, "texts": texts}
        for name, value in own.items():
            self.register_buffer(name, value)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, C) of what the projection reads."""
        found = _unit(self.projection(features))
        return _scores(found, self.texts, self.logit_scale, self.logit_bias)


class _Classifier(nn.Module):
    """See `PromptedCLIP.classifier`."""

    def __init__(self, vision: PromptedViT, contrast: _Contrast) -> None:
        super().__init__()
        self.vision, self.contrast = vision, contrast

    def forward(self, images: Tensor, engine: str = "reference") -> Tensor:
        """Logits (B, C) of images (B, 3, H, W)."""
        return self.contrast(self.vision(images, engine))


def prompted_clip(
    clip: Any,
    image_prompts: PromptFamily | None = None,
    text_prompts: nn.Module | None = None,
    class_names: Sequence[str] = (),
    template: str | None = None,
    tokenizer: Callable[..., Any] | None = None,
    *,
    pair: Any = None,
    kld: KLD | None = None,
    train_backbone: str | Sequence[str] = (),
) -> PromptedCLIP:
    """`PromptedCLIP` of a CLIP or SigLIP model of open_clip or transformers, which is taken over.

    Args:
        clip: open_clip's `CLIP` or `CustomTextCLIP`, transformers' `CLIPModel` or `SiglipModel`.
        image_prompts: an unused family; None: no prompts in the image tower.
        text_prompts: an unused context, see `PromptedText`; None: no learned rows.
        class_names: one per class.
        template: the text of a class, "{}" for its name. None: "a photo of a {}." without learned
            rows, and "{}." with them, which stand in the place of the words before the name.
        tokenizer: of the texts: one of transformers, or a function of a list of texts that gives
            int64 (C, N), start and end tokens included (open_clip's `get_tokenizer`). None:
            open_clip's own where the model has its vocabulary.
        pair: instead of both prompts, see `PromptedCLIP`.
        kld, train_backbone: as in `PromptedViT`.

    Raises:
        UnsupportedBackbone: the model is none of these, or a tower that is not read.
        TypeError, ValueError: naming the argument, what it was and what was expected.
    """
    if pair is not None:
        if image_prompts is not None or text_prompts is not None:
            raise ValueError("pair must be None beside image_prompts or text_prompts: it has both")
        image_prompts, text_prompts = pair.image, pair.text
    image_prompts = VPTDeep(0) if image_prompts is None else image_prompts
    view = read_text(clip)
    tower, projection = _image_side(clip)
    template = template_of(template, text_prompts)
    made = tokenised(view, class_names, template, tokenizer, text_prompts, clip)
    text = PromptedText(view, text_prompts, *made)
    width = view.shape.feature_width
    vision = PromptedViT(tower, image_prompts, kld, width, train_backbone=train_backbone)
    vision.head = projection.requires_grad_(False)
    bias = getattr(clip, "logit_bias", None)
    model = PromptedCLIP(vision, text, clip.logit_scale, bias, pair, class_names)
    model.template = template
    return model


def _image_side(clip: Any) -> tuple[nn.Module, nn.Module]:
    """The image tower of a model, and the projection behind its features."""
    if hasattr(clip, "visual"):
        return clip.visual, nn.Identity()
    if not hasattr(clip, "vision_model"):
        raise ValueError(
            f"clip must have an image tower, got {type(clip).__name__}: give the whole model, or "
            "build PromptedText and PromptedCLIP by themselves"
        )
    return clip.vision_model, getattr(clip, "visual_projection", nn.Identity())


def _width_of(vision: PromptedViT) -> int:
    """Of what it gives."""
    width = vision.view.feature_width
    with torch.no_grad():
        return vision.head(vision.view.like.new_zeros(1, width)).shape[-1]


def _scalar(name: str, value: Tensor | float, vision: PromptedViT) -> Tensor:
    found = torch.as_tensor(value, device=vision.device).detach().clone()
    if found.numel() != 1:
        raise ValueError(f"{name} must be one number, got {tuple(found.shape)}")
    return found.reshape(()).to(torch.promote_types(vision.view.like.dtype, torch.float32))


def _unit(features: Tensor) -> Tensor:
    """Of length 1, in at least fp32."""
    with _no_autocast(features.device):
        wide = features.to(torch.promote_types(features.dtype, torch.float32))
        return F.normalize(wide, dim=-1)


def _scores(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """(B, C) of unit features (B, E) and (C, E)."""
    with _no_autocast(images.device):
        found = scale.exp() * (images @ texts.T)
        return found if bias is None else found + bias


def _version(tensor: Tensor | None) -> tuple[Any, ...]:
    """Another one when a tensor is replaced or written in place; it is held, so that no later one
    takes its place.
    """
    return () if tensor is None else (tensor, tensor.data_ptr(), tensor._version, tensor.dtype)


def _unchanged(before: list[Any], now: list[Any]) -> bool:
    """Whether states are the same: objects by identity, what `_version` gave by its parts."""

    plain = (int, float, str, bool, torch.device)

    def same(a: Any, b: Any) -> bool:
        if type(a) is tuple and type(b) is tuple:
            return len(a) == len(b) and all(map(same, a, b))
        return a is b or (type(a) is type(b) and type(a) in plain and a == b)

    return len(before) == len(now) and all(map(same, before, now))


def _no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, enabled=False)
