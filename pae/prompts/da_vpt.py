"""DA-VPT: in some blocks prompts are proxies of classes, pulled towards the images they stand for.

Source: Ren et al., "DA-VPT: Semantic-Guided Visual Prompt Tuning for Vision Transformers" (CVPR
2025, arXiv 2505.23694).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pae_kernels.checks import describe
from pae_kernels.precision import exact_matmul

from .base import BackboneShape, PerThread, check_choice, check_count, check_flag, sum_over_ranks
from .registry import register
from .vpt import VPTDeep

NORMS = ("none", "l2", "layer")
CLASS_FEATURES = ("query", "row")
EPS = 1e-6  # of both norms
KMEANS_ITERATIONS = 20
FIRST_IMAGES = 10  # of each class, for the first map
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@register("da-vpt")
class DAVPT(VPTDeep):
    """VPT-deep whose prompts in `proxy_blocks` also minimise a proxy-anchor loss.

    With s(f, P_j) = kappa cos(f, P_j), and + the images whose class is mapped to prompt j:

        PA(f) = mean_j log(1 + sum_+ exp(-alpha (s - delta)))
              + mean_j log(1 + sum_- exp(alpha (s + delta)))
        penalty = mean over proxy blocks of w_v PA(mean patch) + w_c PA(class query)

    Both features are those that enter the block: the mean of its patch rows, and the class row's
    query. A prompt without images on a side adds 0 there. `model.penalty()` has this term; the
    training loop gives `see_labels(labels)` before each forward and asks `remap` before every
    epoch, which maps classes to prompts by k-means of the classes' mean features.

    As in the released code, whose patch feature is the mean of the raw rows whatever its options
    say. Not taken over: its attention mask, which cannot change a class token's logits.

    Published numbers are all of DA-VPT+, which is more than this class: it also trains the biases
    of keys, values, output projection, second MLP layer and second norm, all of the first norm and
    the class token, with drop-path 0.1, batches of two images per class, a weight decay of the
    head alone (0.05 to 20), gradients clipped to [-10, 10], and AdamW at 5e-4 to 5e-3. Prompts
    start two to three times shorter than VPT's and turn that much faster at the same rate, so a
    rate that suits VPT is too high.

    Args:
        num_tokens: prompts of the other blocks.
        num_proxies: prompts of each proxy block; where there are fewer classes, one per class.
        num_classes: of the labels.
        proxy_blocks: their indices, ascending; None is the last two.
        norm: of prompts before they enter: "none", "l2", or "layer" (one LayerNorm for all blocks,
            its weight and bias trained).
        patch_weight, class_weight: w_v and w_c. The released default is 0 for both; its
            configurations have 0.01 to 0.5, most often 0.01 and 0.05, CUB's 0.05 and 0.05,
            CIFAR-100's 1 and 0.05.
        kappa, alpha, delta: 5, 32, 0.1 as released.
        init_divisor: of the Xavier-uniform start of each group (blocks, P, D); released: 1 or 8.
        dropout, dropout_scope: as in `VPTDeep`.
        class_feature: "query", or "row": the class row itself.
        remap_from: the first epoch, counted from 0, whose training forwards give the classes' mean
            features for a new map; released: 1 or 10. Epochs before keep the first map.
        spare_proxies: keep `num_proxies` prompts where there are fewer classes (not as released):
            those that no class is mapped to are only pushed away. KLD and MPA need it there, since
            they want one number of prompts in all blocks.
        seed: of the k-means.

    Attributes:
        tokens: as in `VPTDeep`. class_map: (num_classes,) int64, prompt of each class: class c
            starts at c mod num_proxies, until `remap`.
        centroids: (prompts of a proxy block, D) of the last `remap`, zeros before.
        prompt_norm: the LayerNorm, or None.

    The sums of an epoch in progress are no part of `state_dict` but of `rank_state`: a run that is
    to go on in the middle of an epoch keeps both.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what was expected.
    """

    class_map: Tensor
    centroids: Tensor
    prompt_norm: nn.LayerNorm | None
    training_arguments = (
        *(*VPTDeep.training_arguments, "patch_weight", "class_weight", "kappa", "alpha", "delta"),
        *("init_divisor", "class_feature", "remap_from", "seed"),
        "spare_proxies",  # of which the number of prompts says the rest
    )

    def __init__(
        self,
        num_tokens: int,
        num_proxies: int,
        num_classes: int,
        proxy_blocks: Iterable[int] | None = None,
        norm: str = "none",
        patch_weight: float = 0.05,
        class_weight: float = 0.05,
        kappa: float = 5.0,
        alpha: float = 32.0,
        delta: float = 0.1,
        init_divisor: float = 1.0,
        dropout: float = 0.0,
        dropout_scope: str = "batch",
        class_feature: str = "query",
        remap_from: int = 1,
        spare_proxies: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(check_count("num_tokens", num_tokens), dropout, dropout_scope)
        self.num_proxies = check_count("num_proxies", num_proxies)
        self.num_classes = check_count("num_classes", num_classes)
        if num_proxies == 0 or num_classes == 0:
            raise ValueError(
                "num_proxies and num_classes must be at least 1, got "
                f"{num_proxies} and {num_classes}"
            )
        self.proxy_blocks = None if proxy_blocks is None else sorted(proxy_blocks)
        self.norm = check_choice("norm", norm, NORMS)
        self.patch_weight, self.class_weight = float(patch_weight), float(class_weight)
        self.kappa, self.alpha, self.delta = float(kappa), float(alpha), float(delta)
        if not init_divisor > 0:
            raise ValueError(f"init_divisor must be above 0, got {init_divisor}")
        self.init_divisor = float(init_divisor)
        self.class_feature = check_choice("class_feature", class_feature, CLASS_FEATURES)
        self.remap_from = check_count("remap_from", remap_from)
        self.spare_proxies = check_flag("spare_proxies", spare_proxies)
        self.seed = check_count("seed", seed)
        self.register_module("prompt_norm", None)
        self._observed: frozenset[int] = frozenset()
        self._next = PerThread()  # labels of this thread's next forward
        self._epoch = 0  # epochs begun
        # (num_classes, D + 1): sums of features | number of images, of this process in this epoch
        self._sums: Tensor | None = None

    @property
    def _proxies(self) -> int:
        """Prompts of a proxy block."""
        return self.num_proxies if self.spare_proxies else min(self.num_proxies, self.num_classes)

    def bind(self, shape: BackboneShape) -> None:
        blocks = self.proxy_blocks
        if blocks is None:
            blocks = list(range(max(0, shape.depth - 2), shape.depth))
        if not blocks or blocks[0] < 0 or blocks[-1] >= shape.depth or len({*blocks}) < len(blocks):
            raise ValueError(
                f"proxy_blocks must be distinct indices in [0, {shape.depth}), got {blocks}"
            )
        if not shape.has_class_token:
            raise ValueError("DAVPT reads the class token, and the backbone has none")
        if self.class_feature == "query" and shape.num_heads * shape.head_width != shape.width:
            raise ValueError(
                f"DAVPT compares queries of width {shape.num_heads * shape.head_width} with "
                f"prompts of width {shape.width}: they must be equal"
            )
        self._observed = frozenset(blocks)
        super().bind(shape)
        self.register_buffer("class_map", torch.arange(self.num_classes) % self._proxies)
        self.register_buffer("centroids", torch.zeros(self._proxies, shape.width))
        if self.norm == "layer":
            self.prompt_norm = nn.LayerNorm(shape.width, eps=EPS)
        with torch.no_grad():
            for i, rows in enumerate(super()._blocks()):
                group = len(blocks) if i in self.observed else shape.depth - len(blocks)
                if len(rows):
                    bound = (6 / ((len(rows) + group) * shape.width)) ** 0.5 / self.init_divisor
                    rows.uniform_(-bound, bound)

    def _counts_of(self, depth: int) -> list[int]:
        others = super()._counts_of(depth)
        return [self._proxies if i in self._observed else n for i, n in enumerate(others)]

    def _normed(self, rows: Tensor) -> Tensor:
        if self.norm == "l2":
            return F.normalize(rows, dim=-1, eps=EPS)
        return rows if self.prompt_norm is None else self.prompt_norm(rows)

    def _blocks(self) -> Sequence[Tensor]:
        return [self._normed(rows) for rows in super()._blocks()]

    def _block(self, index: int) -> Tensor:
        return self._normed(super()._block(index))

    def set_prompts(self, prompts: Sequence[Tensor | None]) -> None:
        """Overwrite the tokens; a norm then acts on them, so it must be "none"."""
        if self.norm != "none":
            raise ValueError(f"prompts cannot be set under norm {self.norm!r}, only under 'none'")
        super().set_prompts(prompts)

    def see_labels(self, labels: Tensor) -> None:
        """Labels (B,) of the next forward's images, integers in [0, num_classes).

        Raises:
            ValueError: another shape, no integers, or a label outside of that range; on a GPU the
                range is checked there, and a failure is a device-side assertion.
        """
        self._next.values["labels"] = self._checked(labels)

    def _checked(self, labels: Tensor) -> Tensor:
        """As int64, on the device that they are on."""
        if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.dtype not in INTEGERS:
            raise ValueError(f"labels must be integers (B,), got {describe(labels)}")
        labels = labels.long()
        outside = (labels < 0) | (labels >= self.num_classes)
        if labels.device.type == "cuda":  # a look from the host would wait for the device
            torch._assert_async(~outside.any(), f"labels must be in [0, {self.num_classes})")
        elif outside.any():
            raise ValueError(
                f"labels must be in [0, {self.num_classes}), the num_classes of this DAVPT, got "
                f"{labels[outside][0].item()}"
            )
        return labels

    @property
    def observed(self) -> frozenset[int]:
        return self._observed

    def observe(self, index: int, x: Tensor, class_query: Tensor) -> None:
        if self.training:
            patches = x[:, self.shape.num_prefix_tokens :]
            of_class = class_query if self.class_feature == "query" else x[:, 0]
            self.this_forward["seen", index] = patches.mean(dim=1), of_class
            self.note_graph()

    def observe_features(self, features: Tensor) -> None:
        if self.training:
            self.this_forward["features"] = features.detach()

    def penalty(self) -> Tensor | None:
        """The proxy-anchor term of the last training forward; it is used up."""
        keys = [("seen", i) for i in sorted(self._observed)]
        seen = {i: self.this_forward.pop((k, i)) for k, i in keys if (k, i) in self.this_forward}
        features = self.this_forward.pop("features", None)
        labels = self._next.values.pop("labels", None)
        if not seen and labels is None:
            return None
        if not seen:
            raise ValueError(
                "labels were given to see_labels, and what they belong to is gone: the last "
                "forward was none in training mode; ask for the penalty right behind that"
            )
        self.require_graph()
        images = len(next(iter(seen.values()))[0])
        if labels is None or len(labels) != images:
            got = "none" if labels is None else len(labels)
            raise ValueError(
                f"labels of the {images} images must be given to see_labels before the forward, "
                f"got {got}"
            )
        labels = labels.to(self.class_map.device)
        if features is not None and self._sums is not None:
            self._gather(features, labels)
        owner = self.class_map[labels]  # (B,)
        prompts = self._blocks()
        terms = [
            self.patch_weight * self._proxy_anchor(patch, prompts[i], owner)
            + self.class_weight * self._proxy_anchor(query, prompts[i], owner)
            for i, (patch, query) in seen.items()
        ]
        return torch.stack(terms).mean()

    def _proxy_anchor(self, features: Tensor, proxies: Tensor, owner: Tensor) -> Tensor:
        dtype = torch.promote_types(proxies.dtype, torch.float32)
        with torch.autocast(features.device.type, enabled=False):
            unit = F.normalize(features.to(dtype), dim=-1)
            anchors = self.kappa * F.normalize(proxies.to(dtype), dim=-1)
            s = exact_matmul(anchors, unit.t())  # (P, B)
            own = owner[None] == torch.arange(len(proxies), device=s.device)[:, None]
            pull = (-self.alpha * (s - self.delta)).masked_fill(~own, -torch.inf)
            push = (self.alpha * (s + self.delta)).masked_fill(own, -torch.inf)
            # log(1 + sum exp): a zero logit beside the batch; without images it is log 1 = 0
            pull, push = (F.pad(t, (0, 1)).logsumexp(dim=1).mean() for t in (pull, push))
            return pull + push

    # ---- which prompt a class belongs to

    @torch.no_grad()
    def remap(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Give every class to a prompt: `cosine_kmeans` of the classes' mean features.

        Features are those before the head; the means of a class are layer-normed. The first map is
        of the bare backbone and of 10 images per class. Later ones are of the training forwards
        of the epoch that has just ended, from epoch `remap_from` on, and take no pass. k-means
        starts at random classes, then at the last centroids. A class without an image gets a random
        prompt. When all classes fall on one prompt, nothing changes.

        With several processes, each gives its own share of the images, and all get the same map.

        Nothing happens where each class has a prompt of its own, or all have the same.

        Args:
            model: the `PromptedViT` of this family; its backbone is evaluated.
            batches: (images, labels); read before the first epoch alone, until every class has its
                10 images.

        Raises:
            ValueError: no image; labels as in `see_labels`.
        """
        if self._proxies == 1 or self.num_classes < self.num_proxies:
            return
        width, like = self.centroids.shape[1], self.tokens
        if self._sums is None:
            wide = torch.promote_types(like.dtype, torch.float32)
            self._sums = torch.zeros(self.num_classes, width + 1, dtype=wide, device=like.device)
        first = self._epoch == 0 and not self.centroids.any()
        if first:
            self._look(model, batches)
        if first or self._epoch > self.remap_from:
            sums = sum_over_ranks(self._sums.clone()).double().cpu()
            if first and not sums[:, -1].any():
                raise ValueError("batches must hold at least one image, got none")
            self._cluster(sums[:, :-1], sums[:, -1:])
        self._sums.zero_()  # in place: a captured step adds to this very tensor
        self._epoch += 1

    def _look(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Gathers the first images of every class, seen by the backbone without prompts."""
        backbone = cast(nn.Module, model.backbone)
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        missing = torch.full((self.num_classes,), -(-FIRST_IMAGES // ranks))
        for images, labels in batches:
            labels = self._checked(labels.cpu())
            if len(labels) != len(images):
                raise ValueError(f"labels must be one per image, {len(images)}, got {len(labels)}")
            of_class = F.one_hot(labels, self.num_classes)
            place = (of_class.cumsum(0) * of_class).sum(1)  # 1 for the first of its class, 2, ...
            chosen = (place <= missing[labels]).nonzero()[:, 0]
            if len(chosen) == 0:
                continue
            features = backbone(images[chosen.to(images.device)])
            self._gather(features, labels[chosen].to(features.device))
            missing -= of_class[chosen].sum(0)
            if not missing.any():
                break

    @torch.no_grad()
    def _gather(self, features: Tensor, labels: Tensor) -> None:
        assert self._sums is not None
        if self._sums.device != features.device:
            self._sums = self._sums.to(features.device)
        if features.dim() == 3:  # a backbone that pools nothing
            features = features[:, 0]
        rows = F.pad(features.to(self._sums.dtype), (0, 1), value=1.0)
        self._sums.index_add_(0, labels, rows)

    def _cluster(self, sums: Tensor, counts: Tensor) -> None:
        """A new map of sums (num_classes, D) and numbers of images (num_classes, 1), on the CPU."""
        present = counts[:, 0] > 0
        if not present.any():
            return
        means = sums[present] / counts[present]
        points = F.layer_norm(means, means.shape[1:])
        draws = np.random.default_rng((self.seed, self._epoch))
        start = self.centroids.double().cpu()
        unknown = (start == 0).all(1).nonzero()[:, 0][: len(points)]
        chosen = torch.from_numpy(draws.permutation(len(points))[: len(unknown)])
        start[unknown] = points[chosen]
        assigned, centroids = cosine_kmeans(points, start)
        if len(points) > 1 and (assigned == assigned[0]).all():
            return
        new = torch.from_numpy(draws.integers(self._proxies, size=self.num_classes))
        new[present] = assigned
        self.class_map.copy_(new)
        self.centroids.copy_(centroids)

    def rank_state(self) -> dict[str, Tensor]:
        """Epochs begun, and the sums of this process in the one in progress."""
        if self._sums is None:
            return {}
        return {"epoch": torch.tensor(self._epoch), "class_sums": self._sums.cpu().clone()}

    def load_rank_state(self, state: Mapping[str, Tensor]) -> None:
        if "class_sums" in state:  # a run of an older version has none
            self._epoch = int(state["epoch"])
            self._sums = state["class_sums"].to(self.tokens.device)


def cosine_kmeans(
    points: Tensor, centroids: Tensor, iterations: int = KMEANS_ITERATIONS
) -> tuple[Tensor, Tensor]:
    """k-means that assigns by angle and averages the points as they are.

    A centroid without points stays where it is; one of zeros gets none.

    Args:
        points: (N, D), N at least 1. centroids: (K, D), where to start.

    Returns:
        (N,) int64, the centroid of each point; (K, D), the centroids.

    Source: the released code of DA-VPT.
    """
    unit = F.normalize(points, dim=1)
    for _ in range(iterations):
        likeness = exact_matmul(unit, F.normalize(centroids, dim=1).t())
        assigned = likeness.masked_fill((centroids == 0).all(1), -torch.inf).argmax(1)
        members = F.one_hot(assigned, len(centroids)).t().to(points)  # (K, N)
        counts = members.sum(1, keepdim=True)
        means = exact_matmul(members, points) / counts.clamp(min=1)
        moved = torch.where(counts > 0, means, centroids)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return assigned, centroids
