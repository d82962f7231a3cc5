"""What is launched on a GPU: by steps, by benchmarks and by tests, on a stand-in (`stand_in.py`).

`of_steps` are training steps in the sizes that benchmarks lead with, in few blocks; `of_benchmarks`
every group of bench/ with the rows that are ours; `of_tests` the bodies of all tests that need a
GPU and Triton.
"""

from __future__ import annotations

import ast
import os
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

import pae
from bench import (
    bench_attention,
    bench_kld,
    bench_pointwise,
    bench_product,
    bench_spectrum,
    bench_step,
    shapes,
)
from bench.runner import Group, Settings, Unavailable
from pae_kernels import prompt_attention
from pae_kernels.pointwise import gated, gated_backward, rotate_
from tests import stand_in
from tests.kernels.executions import EXECUTIONS
from tests.stand_in import Launch

Found = dict[Launch, int]
GPU = torch.device("cuda")
BLOCKS = 3  # a first, a middle and a last one


def of_steps(architecture: int, main: bool = False) -> Found:
    """VPT-deep in ViT-B under autocast, every memory mode, attention of the class row, of causal
    rows, and with the biases of BEiT and Swin; unless `main` also epilogues of its products, fp32,
    what per-sample prompts of VAPT add, KLD, and what blocks of other backbones add.
    """
    with stand_in.gpu(architecture) as launches:
        kinds = (torch.bfloat16, "auto"), (torch.bfloat16, "triton"), (None, "")
        for dtype, epilogue in kinds[: 1 if main else 3]:
            for memory in ("keep", "recompute8", "recompute"):
                with mock.patch.dict(os.environ, {"PAE_EPILOGUE": epilogue}):
                    _step(pae.prompts.VPTDeep(50), dtype, memory)
        qkv = torch.zeros(128, 197, 3, 12, 64, dtype=torch.bfloat16, device=GPU).requires_grad_()
        kv = torch.zeros(1, 50, 2, 12, 64, dtype=torch.bfloat16, device=GPU).requires_grad_()
        prompt_attention(qkv, kv, queries="class")[0].sum().backward()
        bias = torch.zeros(12, 197, 197, device=GPU)
        prompt_attention(qkv, kv, bias=bias)[0].sum().backward()
        # CLIP's text tower, a text for each of 100 classes
        qkv = torch.zeros(100, 77, 3, 8, 64, dtype=torch.bfloat16, device=GPU).requires_grad_()
        kv = torch.zeros(1, 0, 2, 8, 64, dtype=torch.bfloat16, device=GPU)
        prompt_attention(qkv, kv, causal=True)[0].sum().backward()
        # windows of 7 x 7 in the first stage of Swin-B, of which the shifted ones have masks
        qkv = torch.zeros(2048, 49, 3, 4, 32, dtype=torch.bfloat16, device=GPU).requires_grad_()
        kv = torch.zeros(1, 50, 2, 4, 32, dtype=torch.bfloat16, device=GPU).requires_grad_()
        bias, mask = torch.zeros(4, 49, 49, device=GPU), torch.zeros(64, 49, 49, device=GPU)
        for windows in (None, mask):
            prompt_attention(qkv, kv, bias=bias, mask=windows)[0].sum().backward()
        if not main:
            _step(pae.prompts.VPTDeep(50), torch.bfloat16, "keep", pae.KLD(256))
            _step(pae.prompts.VAPT(50), torch.bfloat16, "keep")
            _other_blocks()
    return launches


def _other_blocks() -> None:
    """Gated MLPs, and queries and keys that are turned."""
    u = torch.zeros(128, 197, 2 * 3072, dtype=torch.bfloat16, device=GPU)
    gated_backward(gated(u, "silu"), u, "silu")
    qkv = torch.zeros(128, 197, 3, 12, 64, dtype=torch.bfloat16, device=GPU)
    rotate_(qkv, torch.zeros(2, 196, 32, device=GPU))


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
        for bench in (bench_attention, bench_pointwise, bench_product, bench_kld, bench_spectrum)
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


# ---- tests


def of_tests(architecture: int) -> Found:
    """Bodies of all tests that want a GPU and Triton; nothing is asked of their values."""
    stopped = _Stopped()
    with (
        stand_in.gpu(architecture) as launches,
        mock.patch.object(SourceFileLoader, "get_code", _without_assertions),
        mock.patch.object(torch.testing, "assert_close", lambda *given, **named: None),
    ):
        options = ["-q", "-n0", "--assert=plain", "-p", "no:cacheprovider", "--tb=line"]
        options += ["-k", "gpu-triton or test_gpu", str(TESTS / "pae" / "test_gpu.py")]
        pytest.main([*options, str(TESTS / "kernels")], plugins=[stopped])
    if unknown := sorted(set(stopped.tests) - STOP_EARLY):
        raise RuntimeError(f"on a stand-in these tests stop before their end: {unknown}")
    return launches


TESTS = Path(__file__).parent
STOP_EARLY = {"test_compiles_without_a_break"}  # torch.compile refuses such tensors


class _Stopped:
    """Names of tests that did not come to their end; on the way there each does a thing once."""

    def __init__(self) -> None:
        self.tests: list[str] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for module in {item.module for item in items}:  # type: ignore[attr-defined]
            for name in {"RUNS", "SEEDS"} & vars(module).keys():
                setattr(module, name, 1)
        for execution in EXECUTIONS:
            object.__setattr__(execution, "repeats", 1)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.tests.append(report.nodeid.rpartition("::")[2].partition("[")[0])


def _without_assertions(loader: SourceFileLoader, name: str) -> Any:
    """Code of a module; in those of tests what is asserted is computed, whatever comes out."""
    path = loader.get_filename(name)
    if TESTS not in Path(path).parents:
        return _GET_CODE(loader, name)
    tree = ast.fix_missing_locations(_Computed().visit(ast.parse(loader.get_data(path))))
    return compile(tree, path, "exec", dont_inherit=True)


_GET_CODE = SourceFileLoader.get_code


class _Computed(ast.NodeTransformer):
    def visit_Assert(self, node: ast.Assert) -> ast.stmt:
        test = node.test
        both = isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And)
        parts = ast.Tuple(test.values, ast.Load()) if both else test  # type: ignore[union-attr]
        return ast.copy_location(ast.Expr(parts), node)
