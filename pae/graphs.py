"""A whole training step as one CUDA graph: small batches stop waiting for launches."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pae_kernels.koopman import runs_on_device

from .model import PromptedViT

_WARMUP = 3  # Triton compiles, cuBLAS allocates its workspaces and the plan folds before capture


def graphed_step(
    model: PromptedViT,
    images: Tensor,
    labels: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    memory: str = "keep",
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Capture forward, loss and backward of `model` on batches like this one.

    The returned function copies a batch into the captured one, replays, and leaves this step's
    gradients in the parameters' `.grad` (set, not added: `zero_grad` is not needed), those of
    `model.penalty()` included.

    A penalty that reads the batch (VAPT under KLD, DA-VPT) is part of the captured backward. All
    others depend on no batch. Where such a penalty needs nothing of the host (KLD's kernels run on
    this GPU), its forward and backward are captured too, on a stream of their own that leaves the
    step's before the network and joins it before the network's backward: on a GPU that the batch
    does not fill they cost no time. A family's own penalty must then not synchronise either. Else
    (KLD in fp64, or no kernels) the penalty is computed after each replay.

    Args:
        model: in the mode (train or eval) and under the autocast state that every step shall have.
        images, labels: an example batch on the GPU; later batches have its shapes and dtypes.
        loss: (logits, labels) -> scalar, without host synchronisation.
        memory: as in `pae.fast_forward`.

    Returns:
        step(images, labels) -> (loss, logits), both valid until the next step.

    Raises:
        ValueError: model and images are not on one GPU; the penalty reads the batch, but has no
            kernels; a later batch has another shape or dtype.
        RuntimeError: a later batch comes after prompts have moved between blocks (PRO-VPT), or
            `model.pool` was set.
    """
    if images.device.type != "cuda" or model.device != images.device:
        raise ValueError(
            f"images and model must be on one GPU, got {images.device} and {model.device}"
        )
    model.view.require_one_width("graphed_step")
    kind = images.device.type
    autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    static_images, static_labels = images.clone(), labels.clone()
    parameters = [p for p in model.parameters() if p.requires_grad]
    counts, pool = model.prompts.prompt_counts, model.pool
    of_batch = model.prompts.depends_on_input or bool(model.prompts.observed)
    on_device = _penalty_on_device(model)
    if of_batch and not on_device and model.kld is not None:
        raise ValueError(
            f"model.kld on {type(model.prompts).__name__} must be captured with the batch that it "
            f"reads, but has no kernels on {model.device} in {model.kld.lift.weight.dtype}"
        )
    beside = torch.cuda.Stream(images.device) if on_device and not of_batch else None

    def run() -> tuple[Tensor, Tensor]:
        main = torch.cuda.current_stream(images.device)
        # the weight cache of autocast must not survive into a capture: its casts would be missing
        with torch.autocast(kind, autocast[1], enabled=autocast[0], cache_enabled=False):
            if beside is not None:
                beside.wait_stream(main)
                with torch.cuda.stream(beside):
                    _add_penalty_gradients(model)
            model.prompts.see_labels(static_labels)
            logits = model(static_images, engine="fast", memory=memory)
            value = loss(logits, static_labels)
        if beside is not None:
            main.wait_stream(beside)  # the backward adds to the gradients made there
        (value + model.penalty() if of_batch else value).backward()
        return value.detach(), logits.detach()

    gathered = model.prompts.rank_state()
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
    model.prompts.load_rank_state(gathered)  # the example batch was no step of the epoch
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
        if model.prompts.prompt_counts != counts:
            raise RuntimeError(
                f"model.prompts has {model.prompts.prompt_counts} prompts per block, the captured "
                f"step {counts}: capture a new one"
            )
        static_images.copy_(images, non_blocking=True)
        static_labels.copy_(labels, non_blocking=True)
        if model.pool != pool:
            raise RuntimeError(
                f"model.pool is {model.pool!r}, the captured step's {pool!r}: capture a new one"
            )
        for p in parameters:
            p.grad = captured.get(p)
        graph.replay()
        if beside is None and not of_batch:
            _add_penalty_gradients(model)
        return value, logits

    return step


def _penalty_on_device(model: PromptedViT) -> bool:
    """Whether `model.penalty()` can be captured, as far as KLD is concerned."""
    if model.kld is None:
        return True
    dtype = torch.promote_types(model.kld.lift.weight.dtype, torch.float32)
    return runs_on_device(model.kld.lift.weight.device, dtype)


def _add_penalty_gradients(model: PromptedViT) -> None:
    penalty = model.penalty()
    if penalty.requires_grad:
        penalty.backward()
