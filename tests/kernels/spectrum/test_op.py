"""The frequency-shortcut statistics as ops: registration, versions, and what only a GPU shows."""

from __future__ import annotations

import pytest
import torch

from pae_kernels import backends, native
from pae_kernels.spectrum import cuda, reference, shortcut_images, shortcut_pool, shortcut_tokens
from tests.kernels.executions import BF16, FP16, FP32, FP64, GPU, KERNELS, each
from tests.kernels.spectrum.cases import (
    OP,
    OPS,
    check,
    filtered,
    grid,
    images_of,
    stem_of,
    stem_problem,
    tokens_of,
)

# ---- all three, as ops


@each(OP, on=("reference", "interpreter", "emulated"))
def test_ops_pass_opcheck(execution):
    quick = {"test_utils": ("test_schema", "test_faketensor")}
    tests = execution.pick(reference={}, other=quick)
    spectrum = torch.fft.fft2(images_of(2, 3, 12, 10, FP32))
    origins, (weight, bias) = torch.tensor([[0, 0], [4, 5]]), stem_of((4, 5), dtype=FP32)
    rows = torch.randn(6, 5)
    narrow = execution.pick(interpreter=FP16, other=BF16)
    tokens = [
        (spectrum, origins, 4, weight, bias, rows, FP32),
        (spectrum.mT.contiguous().mT, origins, 4, weight.to(narrow), None, None, narrow),
    ]
    if execution.kind == "reference":
        wide = spectrum.to(torch.complex128)
        tokens.append((wide, origins[:0], 4, weight, bias, None, FP64))
        torch.library.opcheck(OPS.shortcut_images_fwd, (spectrum, origins, 4))
        torch.library.opcheck(OPS.shortcut_images_fwd, (wide, grid(4, 3, 12, 10), 4))
    for args in tokens:
        torch.library.opcheck(OPS.shortcut_tokens_fwd, args, **tests)
    for rows in (None, torch.randn(4, 5)):
        for dtype in (FP32, narrow):
            pooled = torch.randn(2, 3, 4, 5).to(dtype), rows
            torch.library.opcheck(OPS.shortcut_pool_fwd, pooled, **tests)


def test_ops_are_one_graph_under_compile():
    weight, bias = stem_of((3, 5), dtype=torch.float64)
    rows = torch.randn(8, 5, dtype=torch.float64)

    def all_three(images, origins):
        spectrum = torch.fft.fft2(images)
        ours = shortcut_images(spectrum, origins, 4, (12, 10))
        tokens = shortcut_tokens(spectrum, origins, 4, (12, 10), weight, bias)
        return shortcut_pool(ours.flatten(2, 3)), shortcut_pool(tokens, rows)

    images, origins = images_of(2, 3, 12, 10), grid(4, 3, 12, 10)
    compiled = torch.compile(all_three, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images, origins), all_three(images, origins))


def test_ops_ignore_autocast():
    images, origins = images_of(2, 3, 12, 12, torch.float32), grid(4, 4, 12, 12)
    weight, bias = stem_of((4, 4), dtype=torch.float32)
    expected = filtered(images, origins, 4), tokens_of(images, origins, 4, weight, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = filtered(images, origins, 4), tokens_of(images, origins, 4, weight, bias)
        pooled = shortcut_pool(ours[0].flatten(2, 3))
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])
    assert torch.equal(pooled, shortcut_pool(expected[0].flatten(2, 3)))


def test_ops_fill_their_results(poisoned_memory):
    """What the kernels run on in every other test here."""
    images, (weight, bias) = images_of(2, 3, 12, 12), stem_of((4, 4))
    tokens = tokens_of(images, grid(4, 4, 12, 12), 4, weight, bias)
    assert tokens.isfinite().all() and shortcut_pool(tokens).isfinite().all()


def test_ops_say_that_they_have_no_gradient():
    spectrum = torch.fft.fft2(images_of(1, 3, 8, 8)).requires_grad_()
    origins, (weight, bias) = torch.tensor([[0, 0]]), stem_of((4, 4))
    tokens = torch.randn(1, 2, 3, 4, requires_grad=True)
    outputs = (
        OPS.shortcut_images_fwd(spectrum, origins, 4),
        OPS.shortcut_tokens_fwd(spectrum, origins, 4, weight, bias, None, torch.float64),
        OPS.shortcut_pool_fwd(tokens, None),
    )
    for output in outputs:
        with pytest.raises(RuntimeError, match="shortcut statistics have none"):
            output.sum().backward()
    with torch.no_grad():  # a statistic of something trainable is fine where no graph is wanted
        assert shortcut_pool(tokens).shape == (1, 4)


def test_references_are_differentiable():
    origins = torch.tensor([[0, 1], [3, 2]])
    spectrum = torch.fft.fft2(images_of(1, 1, 6, 5)).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: reference.shortcut_images(s, origins, 3), spectrum)
    weight, bias = (t.requires_grad_() for t in stem_of((3, 5), 1, 2))
    rows = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda s, *stem: reference.shortcut_tokens(s, origins, 3, *stem, torch.float64),
        (spectrum, weight, bias, rows),
    )
    tokens = torch.randn(2, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(reference.shortcut_pool, tokens)
    assert torch.autograd.gradcheck(reference.shortcut_pool, (tokens, rows))


# ---- versions, and GPUs


@each(OP, on=KERNELS)
def test_the_kernels_run(execution, monkeypatch):
    """The public ops reach them; what is wider than fp32 goes to the reference."""
    for op in ("shortcut_tokens", "shortcut_pool"):
        assert backends.choose(op, execution.device, FP16).__name__.endswith(execution.version)
        monkeypatch.setattr(reference, op, None)
    problem = execution.moved(*stem_problem((8, 8), (4, 4)))
    assert len(check(execution, *problem, torch.zeros(0, 2, dtype=torch.int64), 2)) == 0
    assert shortcut_pool(torch.ones(1, 1, 1, 1, device=execution.device)) == 1
    monkeypatch.delenv("PAE_BACKEND")  # preferred also when nobody asks for it
    for op in ("shortcut_tokens", "shortcut_pool"):
        chosen = backends.choose(op, execution.device, FP16).__name__
        assert chosen.endswith(execution.version) or execution.kind == "gpu"
        assert backends.choose(op, execution.device, FP64) is reference


@each(OP, on=["emulated"])
def test_bad_parameters_are_refused(execution):
    cpu = torch.device("cpu")
    sizes = {"height": 8, "width": 8, "patch_height": 4, "patch_width": 4, "batch": 1, "lines": 2}
    good = {"lines_padded": 32, "channels": 1, "depth_padded": 16, "dim": 8, "window": 1}
    good |= {"channels_padded": 64}
    for change, message in (
        ({"patch_height": 3}, "patches of 3 x 4 do not tile"),
        ({"lines_padded": 2}, "lines_padded is 2, expected whole tiles of 32"),
        ({"depth_padded": 8}, "depth_padded is 8"),
        ({"dim": 65}, "channels_padded is 64"),
        ({"window": 9}, "window is 9"),
        ({"dtype": 9}, "dtype is 9"),
    ):
        with pytest.raises(RuntimeError, match=f"pae_shortcut_tokens: {message}"):
            native.call("pae_shortcut_tokens", cuda._Tokens(**(sizes | good | change)), cpu)
    for change, message in (({"dim": 2049}, "dim is 2049"), ({"dim": 1, "parts": 2}, "parts is 2")):
        params = cuda._Pool(batch=1, tokens_per_image=3, **change)
        with pytest.raises(RuntimeError, match=f"pae_shortcut_pool: {message}"):
            native.call("pae_shortcut_pool", params, cpu)


@each(OP, on=["gpu"])
def test_a_captured_graph_follows_its_inputs(execution):
    """Spectrum and window origins change between replays."""
    problem = stem_problem((64, 64), (16, 16), batch=4, dim=64, dtype=BF16)
    images, *stem, rows = execution.moved(*problem)
    spectrum = torch.fft.fft2(images)
    origins = torch.tensor([(0, 0), (24, 20)], device=GPU)

    def work():
        tokens = shortcut_tokens(spectrum, origins, 8, (64, 64), *stem, rows=rows)
        return tokens, shortcut_pool(tokens)

    graph, captured = execution.captured(work)
    for seed, places in ((1, [(5, 7), (56, 1)]), (2, [(30, 30), (0, 56)])):
        spectrum.copy_(torch.fft.fft2(images_of(4, 3, 64, 64, FP32, seed).to(GPU)))
        origins.copy_(torch.tensor(places))
        graph.replay()
        for a, b in zip(captured, work(), strict=True):
            assert torch.equal(a, b)


@each(OP, on=["gpu"])
def test_work_follows_the_callers_stream(execution):
    """Inputs that are still being made on another stream than the default one."""
    images, *stem, rows = execution.moved(*stem_problem((64, 64), (16, 16), batch=4, dim=64))
    origins = torch.tensor([(24, 20)], device=GPU)
    spectrum = torch.fft.fft2(images)
    run = lambda spectrum: shortcut_tokens(spectrum, origins, 8, (64, 64), *stem, rows=rows)
    expected = run(spectrum)
    with execution.late(spectrum) as (late,):
        tokens = run(late)
        pooled = shortcut_pool(tokens)
    assert torch.equal(tokens, expected) and torch.equal(pooled, shortcut_pool(expected))


@each(OP, on=["gpu"])
def test_memory_is_that_of_the_result_and_of_strips(execution):
    """No image of full size, filtered or complex."""
    problem = stem_problem((224, 224), (16, 16), batch=32, dim=768, dtype=BF16)
    images, *stem, rows = execution.moved(*problem)
    spectrum, origins = torch.fft.fft2(images), torch.tensor([(104, 104)] * 4, device=GPU)
    run = lambda: shortcut_tokens(spectrum, origins, 16, (224, 224), *stem, rows=rows)
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = run()
    torch.cuda.synchronize()
    beside = torch.cuda.max_memory_allocated() - before - out.nbytes
    strips = 4 * 32 * 3 * 224 * 16 * 2 * 2
    taps = 4 * 16 * 2 * 48 * 768 * 2
    assert beside < 1.2 * (strips + taps) + 8 * 2**20, f"{beside / 2**20:.0f} MB"
    assert beside < images.nbytes * 4
