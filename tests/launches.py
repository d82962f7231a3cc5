"""What is launched on a GPU: by steps, by benchmarks and by tests, on a stand-in (`stand_in.py`).

`of_steps` are training steps in the sizes that benchmarks lead with, in few blocks; `of_benchmarks`
every group of bench/ with the rows that are ours; `of_tests` the bodies of all tests that need a
GPU and Triton.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

import pae
from bench import (
    bench_attention,
    bench_kld,
    bench_pointwise,
    bench_spectrum,
    bench_step,
    shapes,
)
from bench.runner import Group, Settings, Unavailable
from pae_kernels import prompt_attention
from tests import stand_in
from tests.stand_in import Launch

Found = dict[Launch, int]
GPU = torch.device("cuda")
BLOCKS = 3  # a first, a middle and a last one


def of_steps(architecture: int) -> Found:
    """VPT-deep in ViT-B under autocast and in fp32, every memory mode; what per-sample prompts of
    VAPT add, KLD, and attention of the class row.
    """
    with stand_in.gpu(architecture) as launches:
        for dtype in (torch.bfloat16, None):
            for memory in ("keep", "recompute8", "recompute"):
                _step(pae.prompts.VPTDeep(50), dtype, memory)
        _step(pae.prompts.VPTDeep(50), torch.bfloat16, "keep", pae.KLD(256))
        _step(pae.prompts.VAPT(50), torch.bfloat16, "keep")
        qkv = torch.zeros(128, 197, 3, 12, 64, dtype=torch.bfloat16, device=GPU).requires_grad_()
        kv = torch.zeros(1, 50, 2, 12, 64, dtype=torch.bfloat16, device=GPU).requires_grad_()
        prompt_attention(qkv, kv, queries="class")[0].sum().backward()
    return launches


def _step(
    family: pae.prompts.PromptFamily,
    dtype: torch.dtype | None,
    memory: str,
    kld: pae.KLD | None = None,
    batch: int = 128,
) -> None:
    vit = shapes.random_backbone(shapes.BASE, GPU, depth=BLOCKS)
    model = pae.PromptedViT(vit, family, kld).to(GPU).train()
    images = torch.zeros(batch, 3, 224, 224, device=GPU)
    labels = torch.zeros(batch, dtype=torch.long, device=GPU)
    with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
        logits = pae.fast_forward(model, images, memory)
    (F.cross_entropy(logits.float(), labels) + model.penalty()).backward()


def of_benchmarks(architecture: int) -> Found:
    """Rows of ours in every group that runs on a GPU, `--full`."""
    settings = Settings("full", 1, None, None, GPU, "device")
    groups = [
        group
        for bench in (bench_attention, bench_pointwise, bench_kld, bench_spectrum)
        for group in bench.groups(settings)
    ]
    cases = dict.fromkeys(
        case._replace(depth=BLOCKS, prompts=50) for case, *_ in bench_step.cases(settings)
    )
    groups += [bench_step.group(case, settings) for case in cases]
    with stand_in.gpu(architecture) as launches:
        for group in groups:
            _run(group)
    return launches


def _run(group: Group) -> None:
    shared = group.open()
    for provider in group.providers:
        # a graph replays what has been launched
        if provider.name.startswith(("pae", "Triton")) and "graph" not in provider.name:
            try:
                provider.start(shared).work()
            except Unavailable:
                continue


def of_tests(architecture: int, *chosen: str) -> tuple[Found, list[str]]:
    raise NotImplementedError


SOURCES: dict[str, Callable[[int], Found]] = {"steps": of_steps, "benchmarks": of_benchmarks}
