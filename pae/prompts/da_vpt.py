"""DA-VPT: in some blocks prompts are proxies of classes, pulled towards the images they stand for.

Source: Ren et al., "DA-VPT: Semantic-Guided Visual Prompt Tuning for Vision Transformers" (CVPR
2025, arXiv 2505.23694).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pae_kernels.checks import describe

from .base import BackboneShape, PerThread, check_choice, check_count
from .registry import register
from .vpt import VPTDeep

NORMS = ("none", "l2", "layer")
KMEANS_ITERATIONS = 20
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
    training loop gives `see_labels(labels)` before each forward and asks `remap` once per epoch.

    As in the released code, whose patch feature is the mean of the raw rows whatever its options
    say. Not taken over: its DA-VPT+ variant, which also trains backbone biases and norms, and its
    attention mask, which cannot change a class token's logits.

    Args:
        num_tokens: prompts of the other blocks.
        num_proxies: prompts of each proxy block.
        num_classes: of the labels.
        proxy_blocks: their indices, ascending; None is the last two.
        norm: of prompts before they enter: "none", "l2" or "layer" (LayerNorm without affine).
        patch_weight, class_weight: w_v and w_c.
        kappa, alpha, delta: 5, 32, 0.1 as released.
        init_divisor: of the Xavier-uniform start of each group (blocks, P, D); released: 1 or 8.
        dropout, dropout_scope: as in `VPTDeep`.

    Attributes:
        tokens: as in `VPTDeep`. class_map: (num_classes,) int64, prompt of each class: class c
            starts at c mod num_proxies, until `remap`.
        centroids: (num_proxies, D) of the last `remap`, zeros before.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what was expected.
    """

    class_map: Tensor
    centroids: Tensor

    def __init__(
        self,
        num_tokens: int,
        num_proxies: int,
        num_classes: int,
        proxy_blocks: Iterable[int] | None = None,
        norm: str = "none",
        patch_weight: float = 1.0,
        class_weight: float = 1.0,
        kappa: float = 5.0,
        alpha: float = 32.0,
        delta: float = 0.1,
        init_divisor: float = 1.0,
        dropout: float = 0.0,
        dropout_scope: str = "batch",
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
        self._observed: frozenset[int] = frozenset()
        self._next = PerThread()  # labels of this thread's next forward

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
        if shape.num_heads * shape.head_width != shape.width:
            raise ValueError(
                f"DAVPT compares queries of width {shape.num_heads * shape.head_width} with "
                f"prompts of width {shape.width}: they must be equal"
            )
        self._observed = frozenset(blocks)
        super().bind(shape)
        self.register_buffer("class_map", torch.arange(self.num_classes) % self.num_proxies)
        self.register_buffer("centroids", torch.zeros(self.num_proxies, shape.width))
        with torch.no_grad():
            for i, rows in enumerate(super()._blocks()):
                group = len(blocks) if i in self.observed else shape.depth - len(blocks)
                if len(rows):
                    bound = (6 / ((len(rows) + group) * shape.width)) ** 0.5 / self.init_divisor
                    rows.uniform_(-bound, bound)

    def _counts_of(self, depth: int) -> list[int]:
        others = super()._counts_of(depth)
        return [self.num_proxies if i in self._observed else n for i, n in enumerate(others)]

    def _normed(self, rows: Tensor) -> Tensor:
        if self.norm == "l2":
            return F.normalize(rows, dim=-1)
        if self.norm == "layer":
            return F.layer_norm(rows, rows.shape[-1:])
        return rows

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
            self.this_forward["seen", index] = patches.mean(dim=1), class_query

    def penalty(self) -> Tensor | None:
        """The proxy-anchor term of the last training forward; it is used up."""
        keys = [("seen", i) for i in sorted(self._observed)]
        seen = {i: self.this_forward.pop((k, i)) for k, i in keys if (k, i) in self.this_forward}
        labels = self._next.values.pop("labels", None)
        if not seen:
            return None
        images = len(next(iter(seen.values()))[0])
        if labels is None or len(labels) != images:
            got = "none" if labels is None else len(labels)
            raise ValueError(
                f"labels of the {images} images must be given to see_labels before the forward, "
                f"got {got}"
            )
        owner = self.class_map[labels.to(self.class_map.device)]  # (B,)
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
            s = self.kappa * F.normalize(proxies.to(dtype), dim=-1) @ unit.t()  # (P, B)
            own = owner[None] == torch.arange(len(proxies), device=s.device)[:, None]
            pull = (-self.alpha * (s - self.delta)).masked_fill(~own, -torch.inf)
            push = (self.alpha * (s + self.delta)).masked_fill(own, -torch.inf)
            # log(1 + sum exp): a zero logit beside the batch; without images it is log 1 = 0
            pull, push = (F.pad(t, (0, 1)).logsumexp(dim=1).mean() for t in (pull, push))
            return pull + push

    @torch.no_grad()
    def remap(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Give every class to a prompt: k-means of the classes' mean features, by angle.

        Features are those before the head, layer-normed, averaged per class and scaled to length 1;
        at most 20 iterations, started at the last centroids where there are any. Classes without an
        image keep their prompt.

        Args:
            model: the `PromptedViT` of this family; evaluated, its flags restored. Before training
                its prompts are nearly without effect, as released code takes the bare backbone.
            batches: (images, labels).

        Raises:
            ImportError: scikit-learn is not installed.
            ValueError: no batch; labels as in `see_labels`.
        """
        try:
            from sklearn.cluster import KMeans
        except ImportError as error:
            raise ImportError("remap needs scikit-learn: pip install 'pae[clustering]'") from error
        sums, counts = self._class_means(model, batches)
        present = counts > 0
        means = F.normalize(F.layer_norm(sums[present] / counts[present, None], sums.shape[1:]))
        clusters = min(self.num_proxies, len(means))
        known = self.centroids[:clusters].double().cpu()
        start = known.numpy() if known.any(dim=1).all() else "k-means++"
        points = means.cpu().numpy()
        fit = KMeans(clusters, init=start, n_init=1, max_iter=KMEANS_ITERATIONS, random_state=0)
        assigned = torch.from_numpy(fit.fit_predict(points)).long()
        self.class_map[present.to(self.class_map.device)] = assigned.to(self.class_map)
        self.centroids[:clusters] = F.normalize(torch.from_numpy(fit.cluster_centers_)).to(
            self.centroids
        )

    def _class_means(
        self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        width = self.centroids.shape[1]
        sums = torch.zeros(self.num_classes, width, dtype=torch.float64)
        counts = torch.zeros(self.num_classes, dtype=torch.float64)
        training, head = model.training, model.head
        model.eval()
        model.head = nn.Identity()
        try:
            for images, labels in batches:
                labels = self._checked(labels.cpu())
                if len(labels) != len(images):
                    raise ValueError(
                        f"labels must be one per image, {len(images)}, got {len(labels)}"
                    )
                features = model(images, engine="fast").double().cpu()
                sums.index_add_(0, labels, features)
                counts.index_add_(0, labels, torch.ones_like(labels, dtype=counts.dtype))
        finally:
            model.head = head
            model.train(training)
        if not counts.any():
            raise ValueError("batches must hold at least one image, got none")
        return sums, counts
