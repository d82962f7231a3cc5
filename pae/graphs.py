"""A whole training step as one CUDA graph: small batches stop waiting for launches."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import PromptedViT

_WARMUP = 3  # Triton compiles, cuBLAS allocates its workspaces and the plan folds before capture


def graphed_step(
    model: PromptedViT,
    images: Tensor,
    labels: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    memory: str = "exact",
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Capture forward, loss and backward of `model` on batches like this one.

    The returned function copies a batch into the captured one, replays, and leaves this step's
    gradients in the parameters' `.grad` (set, not added: `zero_grad` is not needed).
    `model.penalty()` depends on no batch: it is computed after the replay, outside the graph, and
    its gradients are added.

    Args:
        model: in the mode (train or eval) and under the autocast state that every step shall have.
        images, labels: an example batch on the GPU; later batches have its shapes and dtypes.
        loss: (logits, labels) -> scalar, without host synchronisation.
        memory: as in `pae.fast_forward`.

    Returns:
        step(images, labels) -> (loss, logits), both valid until the next step.

    Raises:
        ValueError: model and images are not on one GPU; a later batch has another shape or dtype.
    """
    if images.device.type != "cuda" or model.device != images.device:
        raise ValueError(
            f"images and model must be on one GPU, got {images.device} and {model.device}"
        )
    kind = images.device.type
    autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    static_images, static_labels = images.clone(), labels.clone()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run() -> tuple[Tensor, Tensor]:
        # the weight cache of autocast must not survive into a capture: its casts would be missing
        with torch.autocast(kind, autocast[1], enabled=autocast[0], cache_enabled=False):
            logits = model(static_images, engine="fast", memory=memory)
            value = loss(logits, static_labels)
        value.backward()
        return value.detach(), logits.detach()

    stream = torch.cuda.Stream(images.device)
    stream.wait_stream(torch.cuda.current_stream(images.device))
    with torch.cuda.stream(stream):
        for _ in range(_WARMUP):
            for p in parameters:
                p.grad = None
            run()
    torch.cuda.current_stream(images.device).wait_stream(stream)
    for p in parameters:
        p.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value, logits = run()
    captured = {p: p.grad for p in parameters if p.grad is not None}

    def step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        for name, new, static in (
            ("images", images, static_images),
            ("labels", labels, static_labels),
        ):
            if new.shape != static.shape or new.dtype != static.dtype:
                raise ValueError(
                    f"{name} must be {tuple(static.shape)} {static.dtype} as captured, got "
                    f"{tuple(new.shape)} {new.dtype}"
                )
        static_images.copy_(images, non_blocking=True)
        static_labels.copy_(labels, non_blocking=True)
        for p in parameters:
            p.grad = captured.get(p)
        graph.replay()
        penalty = model.penalty()
        if penalty.requires_grad:
            penalty.backward()
        return value, logits

    return step
