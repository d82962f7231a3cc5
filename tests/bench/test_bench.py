"""The benchmarks measure what they say: times, saved bytes, peers, counts, table."""

from __future__ import annotations

import gc
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import pae
from pae_kernels.pointwise import activation

ROOT = Path(__file__).parents[2]

from bench import (  # noqa: E402
    bench_attention,
    bench_backbones,
    bench_mpa,
    bench_pointwise,
    bench_product,
    bench_scaling,
    bench_step,
    cost,
    memory,
    merge,
    ops,
    results,
    roofline,
    rows,
    runner,
    shapes,
    steps,
    table,
    timing,
)
from bench.peers import attention as peers_attention  # noqa: E402
from bench.peers import kld as peers_kld  # noqa: E402
from bench.peers import vpt as peers  # noqa: E402
from bench.studies import runs  # noqa: E402

CPU = torch.device("cpu")


SETTINGS = runner.Settings("default", 1, None, None, CPU, "process")


# ---- clock and rounds


def test_a_sample_is_wall_time_and_cpu_time(monkeypatch):
    """Of a machine on which 3 s pass, one of them on the CPU; `clock.check` asks the real one."""
    clocks = {"wall": 10.0, "process": 5.0}

    def work():
        clocks["wall"] += 3
        clocks["process"] += 1

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clocks["wall"])
    monkeypatch.setattr(timing.time, "process_time", lambda: clocks["process"])
    assert timing.measure(work, CPU) == timing.Sample(wall=3, process=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_clock_sees_what_runs_on_the_device():
    device = torch.device("cuda")
    a = torch.randn(4096, 4096, device=device)

    def seconds(count: int) -> float:
        products = lambda: [a @ a for _ in range(count)]
        return min(timing.measure(products, device).device for _ in range(5))

    assert 7 < seconds(10) / seconds(1) < 13


def test_device_time_of_cpu_work_is_an_error():
    with pytest.raises(ValueError, match="device"):
        timing.measure(lambda: None, CPU).seconds("device")


def test_garbage_collection_is_off_while_measuring_and_on_again_after():
    seen = []
    timing.measure(lambda: seen.append(gc.isenabled()), CPU)
    assert seen == [False] and gc.isenabled()


def test_interleaving_gives_everybody_every_place():
    order = []
    works = {name: lambda name=name: order.append(name) for name in "abc"}
    samples = timing.interleave(works, 4, CPU)
    assert "".join(order) == "abcbcacababc"
    assert {name: len(s) for name, s in samples.items()} == {"a": 4, "b": 4, "c": 4}


def test_interleaving_ends_behind_a_whole_round():
    rounds = []
    works = dict.fromkeys("ab", lambda: None)
    samples = timing.interleave(
        works, 9, CPU, lambda found: rounds.append(found) or len(rounds) > 1
    )
    assert [len(of) for of in samples.values()] == [2, 2]


def test_no_round_begins_late_but_the_least(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])

    def work():
        now[0] += 1.0

    def count(seconds, least):
        return len(runs.in_turns({"a": work}, 9, "process", CPU, seconds, least)["a"])

    assert (count(3.5, 1), count(0.5, 1), count(0.5, 3), count(99.0, 3)) == (4, 1, 3, 9)


def test_interleaving_cancels_a_machine_that_slows_down(monkeypatch):
    """Every second the machine gets 10 % slower; `fast` needs 1 unit of work, `slow` needs 2."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "process_time", lambda: now[0])

    def work(units):
        now[0] += units * (1 + 0.1 * now[0])

    works = {"fast": lambda: work(1.0), "slow": lambda: work(2.0)}
    samples = timing.interleave(works, 6, CPU)
    rows = {name: results.Row("g", name, [s.process for s in of]) for name, of in samples.items()}
    assert rows["slow"].times(rows["fast"])[0] == pytest.approx(2.0, rel=0.15)

    now[0] = 0.0
    alone = {name: timing.interleave({name: w}, 6, CPU)[name] for name, w in works.items()}
    first, second = (sorted(s.process for s in alone[name])[3] for name in ("fast", "slow"))
    assert second / first > 3  # what one row after the other would have said


# ---- what autograd keeps


def test_saved_bytes_counts_storages_once_and_frozen_ones_never():
    x = torch.randn(8, 16, requires_grad=True)
    layer = nn.Linear(16, 32).requires_grad_(False)
    with memory.SavedBytes(layer.parameters()) as saved:
        y = layer(x)  # keeps the weight only
        (y.sin() + y.cos()).sum()  # keep y twice
    assert saved.activations == 8 * 32 * 4
    assert saved.weight_copies == 0


def test_saved_bytes_counts_a_view_as_all_that_it_keeps_alive():
    x = torch.randn(1000, requires_grad=True)
    with memory.SavedBytes([]) as saved:
        (2 * x)[:1].sin()
    assert saved.activations == 1000 * 4


def test_saved_bytes_tells_autocast_copies_of_weights_apart():
    x = torch.randn(8, 16, requires_grad=True)
    layer = nn.Linear(16, 32).requires_grad_(False)
    with memory.SavedBytes(layer.parameters()) as saved, torch.autocast("cpu", torch.bfloat16):
        layer(x).sin()
    assert saved.weight_copies == 16 * 32 * 2
    assert saved.activations == 8 * 32 * 2


def test_tensors_of_a_plan_are_all_found():
    model = pae.PromptedViT(shapes.random_backbone(shapes.TINY, CPU), pae.prompts.VPTDeep(3))
    found = {t.data_ptr() for t in memory.tensors_in(model.plan())}
    block = model.plan().blocks[1]
    assert {block.w_qkv.data_ptr(), block.w_fc2.data_ptr(), block.b_proj.data_ptr()} <= found


# ---- peers


def test_official_style_peer_is_vpt_deep():
    """fp64: logits and prompt gradients of the peer and of the reference definition."""
    vit = shapes.random_backbone(shapes.TINY, CPU).double()
    model = pae.PromptedViT(vit, pae.prompts.VPTDeep(5))
    peer = peers.OfficialStyleVPT(vit, model.prompts.tokens, model.head)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    for forward in (model, peer):
        F.cross_entropy(forward(images), torch.arange(3)).backward()
    torch.testing.assert_close(peer(images), model(images), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(peer.prompts.grad, model.prompts.tokens.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(peer.head.weight.grad, model.head.weight.grad)


def test_peer_shares_the_frozen_weights_and_trains_prompts_and_head_only():
    vit = shapes.random_backbone(shapes.TINY, CPU)
    head = vit.head
    peer = peers.OfficialStyleVPT(vit, torch.zeros(4, 5, 64), head)
    qkv = vit.blocks[0].attn.qkv.weight
    assert peer.blocks[0].attn.q.weight.data_ptr() == qkv.data_ptr()
    trained = {name for name, p in peer.named_parameters() if p.requires_grad}
    assert trained == {"prompts", "head.weight", "head.bias"}


@pytest.mark.parametrize(("prompts", "saving"), [(10, 1.16), (50, 1.37), (100, 1.63), (200, 2.14)])
def test_live_flops_against_counted_ones(prompts, saving):
    """ViT-B/16: the official-style step's products, counted by PyTorch, over those needed."""
    with torch.device("meta"):
        vit = shapes.timm.create_model(shapes.BASE, num_classes=200)
        head = vit.head
        peer = peers.OfficialStyleVPT(vit, torch.zeros(12, prompts, 768), head)
        images = torch.zeros(4, 3, 224, 224)
    with FlopCounterMode(display=False) as counter:
        peer(images).sum().backward()
    live = cost.live_step_flops(cost.Shape.of(vit, 200), prompts, batch=4)
    assert counter.get_total_flops() / live == pytest.approx(saving, rel=0.005)


# ---- rooflines of the kernels


@pytest.mark.parametrize(("kind", "share"), [("forward", 1), ("backward", 2), ("both", 3)])
def test_attention_flops_against_counted_ones(kind, share):
    """What PyTorch counts of the written-out forward, and twice that for a backward."""
    qkv, kv = torch.randn(2, 7, 3, 4, 8), torch.randn(1, 5, 2, 4, 8)
    with FlopCounterMode(display=False) as counter:
        peers_attention.eager(qkv, kv)
    live = roofline.attention_flops(kind, batch=2, tokens=7, prompts=5, width=32)
    assert live == share * counter.get_total_flops()


def test_koopman_flops_against_counted_ones():
    """The forward with one decomposition for all pairs, without what that takes; three times it."""
    depth, prompts, width, dim = 5, 3, 16, 8
    lift, K, L = torch.randn(dim, width), torch.randn(dim, dim), torch.randn(dim, dim)
    with FlopCounterMode(display=False) as counter:
        peers_kld.batched_eigh_terms(torch.randn(depth, prompts, width), lift, K, L)
    norm = 2 * dim**3 + 2 * dim**2  # L^T L, and L times its first vector
    counted = 3 * (counter.get_total_flops() - norm)
    assert roofline.koopman_flops(depth, prompts, width, dim) == counted


def test_flops_of_a_window_of_mpa_against_counted_ones():
    """Those of our forward, but for its patch embedding."""
    shared = bench_mpa.open_batch((shapes.TINY, 8, 8, 5, 2), CPU, ranked=2)
    shared.model.plan()  # which runs a block once to see that it is understood
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pae.fast_forward(shared.model, shared.images)
    with FlopCounterMode(display=False) as embedding:
        shared.model.backbone.patch_embed(shared.images)
    counted = counter.get_total_flops() - embedding.get_total_flops()
    assert shared.columns()["live_gflop"] * 1e9 == pytest.approx(counted, rel=0.01)


def test_attention_bytes_are_those_of_inputs_and_outputs():
    qkv, kv, out = (
        torch.zeros(size).bfloat16() for size in ((2, 7, 3, 4, 8), (1, 5, 2, 4, 8), (2, 7, 32))
    )
    sizes = (2, 7, 5, 32, 2)
    forward = qkv.nbytes + kv.nbytes + out.nbytes
    backward = 2 * qkv.nbytes + 2 * kv.nbytes + 2 * out.nbytes  # d_out and out; d_qkv and d_kv
    assert roofline.attention_bytes("forward", *sizes) == forward
    assert roofline.attention_bytes("backward", *sizes) == backward
    assert roofline.attention_bytes("both", *sizes) == forward + backward


@pytest.mark.parametrize("name", sorted(bench_pointwise.KINDS))
def test_bytes_of_a_pass_are_those_of_its_arguments_and_results(name):
    """But for one statistic per row."""
    for of in roofline.DTYPES:
        given = bench_pointwise.KINDS[name], 3, 64, of, bench_pointwise.LIMITS, CPU
        shared = ops.open_inputs(*given)
        results = shared.op.pieces[bench_pointwise.OURS](*shared.arguments)
        moved = [t for t in (*shared.arguments, *results) if t.shape[-1] > 1]
        assert shared.columns == {"floor_mb": sum(t.nbytes for t in moved) / 1e6}


@pytest.mark.parametrize("name", sorted(bench_product.KINDS))
def test_a_product_and_what_is_behind_it_by_everybody(name, monkeypatch):
    """The same values; products and bytes as they are counted; on a CPU one kernel has a reason."""
    given = bench_product.KINDS[name], 70, 64, "bf16", bench_product.LIMITS, CPU
    shared = ops.open_inputs(*given)
    with FlopCounterMode(display=False) as counted:
        results = ops.start(bench_product.TWO, shared).work()
    assert counted.get_total_flops() == shared.columns["live_gflop"] * 1e9
    moved = (*shared.arguments, *results)
    assert sum(t.nbytes for t in moved) == shared.columns["floor_mb"] * 1e6
    for piece in (ops.EAGER, bench_product.TWO, bench_product.ONE):
        if piece == bench_product.ONE:
            monkeypatch.setenv("PAE_BACKEND", "reference")
        ready = ops.start(piece, shared)
        assert 0 < ready.check()["value_error"] < 4e-3
        rolled = lambda *given, w=ready.work: tuple(t.roll(1, 0) for t in w())
        with pytest.raises(AssertionError, match="result 0 is off by"):
            ops.start(rolled, shared).check()
    group = bench_product.group(name, 5, 32, SETTINGS)
    assert [p.left_out for p in group.providers if p.name == bench_product.ONE] == ["needs a GPU"]


def test_peers_of_attention_agree():
    shape = bench_attention.Shape(2, 8, 7, 3, 2, "fp32")
    shared = bench_attention.open_inputs(shape, "both", CPU)
    for attend in (
        peers_attention.eager,
        peers_attention.sdpa(),
        peers_attention.sdpa("math"),
        bench_attention.ours,
    ):
        assert max(rows.errors(shared.run(attend), shared.expected).values()) < 1e-6


def test_a_wrong_attention_is_noticed():
    shape = bench_attention.Shape(2, 8, 7, 3, 2, "fp32")
    shared = bench_attention.open_inputs(shape, "forward", CPU)
    without_prompts = lambda qkv, kv: bench_attention.ours(qkv, kv[:, :0]) + 0 * kv.sum()
    with pytest.raises(AssertionError, match="out is off by"):
        bench_attention.prepare(shared, without_prompts).check()


@pytest.mark.parametrize("size", ["smoke", "quick", "default", "full"])
@pytest.mark.parametrize(
    "module", [bench_step, bench_scaling, bench_attention, bench_pointwise, bench_product]
)
def test_a_gpu_has_groups_of_its_own(module, size):
    """What would run there, without running it: sizes nest, and names are unique."""

    def running(size):
        settings = runner.Settings(size, 1, None, None, torch.device("cuda"), "device")
        groups = module.groups(settings)
        assert len({g.name for g in groups}) == len(groups)
        return {g.name for g in groups if not g.left_out}

    assert running(size)
    smaller = {"default": "quick", "full": "default"}.get(size)
    same = module in (bench_pointwise, bench_product)  # all of theirs run by default
    assert smaller is None or same or running(smaller) < running(size)


def test_peak_on_a_cpu_is_the_most_at_one_time(monkeypatch):
    """Also inside of an operator, and beyond what was there before."""
    monkeypatch.setenv("PAE_BACKEND", "reference")  # whose activation has tensors in between
    size = 2**20
    kept = torch.ones(size)

    def run():
        a = kept + 1
        b = a * 2  # two of them
        del a
        c = b.sin()  # two again
        del b
        return c

    assert memory.peak_bytes(run, CPU) == pytest.approx(2 * 4 * size, abs=100)  # and a scalar
    u = torch.randn(size)
    results = []
    inside = memory.peak_bytes(lambda: results.extend(activation(u, "gelu", code=True)), CPU)
    assert inside > sum(t.nbytes for t in results)


def test_a_cpu_lists_what_only_a_gpu_can_run():
    def rows(module, device):
        settings = runner.Settings("default", 1, None, None, torch.device(device), "process")
        return {p.name: p.left_out for p in module.groups(settings)[-1].providers}

    for module in (bench_step, bench_attention):
        cpu, gpu = rows(module, "cpu"), rows(module, "cuda")
        alone = set(gpu) - set(cpu)
        # a CPU's SDPA chooses by itself, and our versions there have a row each
        assert alone <= {bench_attention.FLASH, "pae"}
        needing = {name for name, reason in cpu.items() if reason == "needs a GPU"}
        assert len(needing) >= 2 and not any(gpu[name] == "needs a GPU" for name in needing)


def test_bf16_weights_change_no_value_and_are_cast_no_more():
    step = bench_step.open_step(bench_step.Case(shapes.TINY, 5, "bf16", 3), CPU)
    for model in (step.official, step.model):
        narrow = steps.narrowed(model)
        norms = [m.weight.dtype for m in narrow.modules() if isinstance(m, nn.LayerNorm)]
        assert set(norms) == {torch.float32}
        assert all(p.dtype == torch.float32 for p in narrow.parameters() if p.requires_grad)
        found = []
        for each in (model, narrow):
            ready = steps.prepare(step, each)
            copies = ready.check()["weight_copies_mb"]
            found.append((copies, step.run(each, each)))
        (cast, logits), (none, same) = found
        head = 2 * model.head.weight.numel() / 1e6  # is trained, and stays in fp32
        assert cast > 2 * head and none == head and torch.equal(same, logits)


def test_random_weights_of_every_kind():
    swin = bench_backbones.backbone(bench_backbones.TINY, CPU)
    rotated = shapes.randomised(shapes.timm.create_model("test_vit4"))
    for module in (swin, rotated):
        for name, p in module.named_parameters():
            last = name.rpartition(".")[2]
            if last.startswith("gamma") or (p.dim() == 1 and last == "weight"):
                assert 0.9 < p.mean() < 1.1 and p.std() > 0.03, name
            elif last.endswith("table"):
                assert 0.7 < p.std() < 1.3, name
            elif last == "weight":
                assert 0.6 < p.std() * p[0].numel() ** 0.5 < 1.6, name
            else:
                assert 0.005 < p.std() < 0.4, name


def test_masks_that_a_peer_makes_once_are_nothing_that_a_step_keeps():
    """In the first step that is looked at, too."""
    step = bench_backbones.open_step(bench_backbones.TINY, 5, "fp32", 2, CPU)
    ready = steps.prepare(step, bench_backbones.swin(step, fused=True))
    first, second = (ready.check()["saved_mb_per_image"] for _ in range(2))
    assert first == second


def test_a_bf16_group_without_instructions_says_so_and_opens_nothing(monkeypatch):
    monkeypatch.setattr(roofline, "bf16_instructions", list)
    group = replace(a_group(runner.Provider("plain", runnable())), open=wrong, dtype="bf16")
    row = runner.run_group(group, {"plain"}, SETTINGS)["plain"]
    assert row.reason == "this processor has no bf16 instructions" and not row.error
    monkeypatch.setattr(roofline, "bf16_instructions", lambda: ["avx512_bf16"])
    row = runner.run_group(group, {"plain"}, SETTINGS)["plain"]
    assert "gradients are off" in row.reason


def test_own_bytes_are_those_that_nobody_shares():
    weight = torch.zeros(10)
    assert memory.own_bytes([weight[:5], torch.zeros(3), weight], [weight]) == 12


class Traffic(TorchDispatchMode):
    """Bytes of all inputs and outputs of the ops that move any."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ("_unsafe_view", "detach", "empty"):
            moved = [*memory.tensors_in(list(args)), *memory.tensors_in(result)]
            self.bytes += sum(t.numel() * t.element_size() for t in moved)
        return result


def test_bytes_of_a_step_are_those_of_its_passes():
    """What one more block adds, seen op by op in a step of pae."""

    def both(depth):
        vit = VisionTransformer(
            img_size=48, patch_size=8, embed_dim=64, depth=depth, num_heads=4, num_classes=4
        )
        model = pae.PromptedViT(vit, pae.prompts.VPTDeep(5))
        images = torch.randn(8, 3, 48, 48)
        model.plan(torch.bfloat16)
        with Traffic() as seen, torch.autocast("cpu", torch.bfloat16):
            pae.fast_forward(model, images).float().sum().backward()
        return seen.bytes, cost.live_step_bytes(cost.Shape.of(vit, 4), 5, 8, 2)

    (seen, live), (seen_more, live_more) = both(4), both(5)
    assert live_more - live == pytest.approx(seen_more - seen, rel=0.02)


def test_slices_of_the_reference_are_the_whole_step(monkeypatch):
    step = bench_step.open_step(bench_step.Case(shapes.TINY, 5, "fp32", 5), CPU)
    monkeypatch.setattr(bench_step, "SLICE", 2)
    assert max(rows.errors(bench_step.reference(step), step.expected).values()) < 1e-5


# ---- tuning


def test_tuning_finds_the_fastest_tile():
    tune = pytest.importorskip("bench.studies.tune_attention", reason="needs Triton")
    shipped, best = tune.Tile(64, 64, 4, 2), tune.Tile(128, 32, 8, 3)
    steps = lambda tile: sum(
        abs(values.index(getattr(tile, name)) - values.index(getattr(best, name)))
        for name, values in tune.CHOICES.items()
    )
    seconds = lambda tile: float("inf") if tile.stages == 4 else 1e-6 * (10 + steps(tile))
    times = tune.search(shipped, seconds, False, time.monotonic() + 60)
    assert min(times, key=times.get) == best
    fixed = tune.search(shipped, seconds, True, time.monotonic() + 60)
    assert {tile.block_m for tile in fixed} == {64}
    assert set(tune.search(shipped, seconds, False, time.monotonic())) == {shipped}
    (target, shape), *_ = tune.TARGETS.items()
    line = tune.report(*target, shape, shipped, times)
    assert line.startswith("FORWARD: (True, 64): Tile(128, 32, 8, 3),  # 10.0 us, shipped 14.0 us")
    hardly = {shipped: 1e-5, best: 0.99e-5}  # not worth another table
    assert "Tile(64, 64, 4, 2)" in tune.report(*target, shape, shipped, hardly)
    alone = {shipped: float("inf")}
    assert "shipped inf us" in tune.report(*target, shape, shipped, alone)


# ---- groups and table


def runnable(work=lambda: None, check=lambda: {}, units=1):
    return lambda shared: runner.Runnable(work, check, units)


def unavailable(shared):
    raise runner.Unavailable("needs a machine from next year")


def wrong():
    raise AssertionError("gradients are off by 1.0e+00, more than 0.0001")


def a_group(*providers):
    return runner.Group("g", lambda: None, providers, ("plain",), rounds=3, unit="step")


def test_wrong_and_missing_providers_get_no_time():
    timed = []
    group = a_group(
        runner.Provider("plain", runnable(lambda: timed.append("plain"))),
        runner.Provider("wrong", runnable(lambda: timed.append("wrong"), wrong)),
        runner.Provider("missing", unavailable),
        runner.Provider("slow", runnable(lambda: timed.append("slow")), left_out="too slow"),
        runner.Provider("not asked for", runnable(lambda: timed.append("other"))),
    )
    outcomes = runner.run_group(group, {"plain", "wrong", "missing", "slow"}, SETTINGS)
    assert timed == ["plain"] * 4  # once for its memory, then three rounds
    assert len(outcomes["plain"].samples) == 3
    assert "gradients are off" in str(outcomes["wrong"].error)
    assert outcomes["missing"].reason == "needs a machine from next year"
    assert outcomes["slow"].reason == "too slow"
    assert set(outcomes) == {"plain", "wrong", "missing", "slow"}


def test_a_group_that_cannot_open_fails_row_by_row():
    def no_weights():
        raise OSError("no weights here")

    group = runner.Group("g", no_weights, [runner.Provider("a", runnable())], (), 3, "step")
    outcome = runner.run_group(group, {"a"}, SETTINGS)["a"]
    assert "no weights here" in str(outcome.error) and not outcome.samples


def test_a_provider_that_breaks_gives_nobody_a_time():
    calls = []

    def breaks():
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("full")

    group = a_group(
        runner.Provider("plain", runnable()), runner.Provider("breaks", runnable(breaks))
    )
    outcomes = runner.run_group(group, {"plain", "breaks"}, SETTINGS)
    for outcome in outcomes.values():
        assert "full" in str(outcome.error) and not outcome.samples


def test_every_row_gets_its_memory_and_the_ceilings_of_its_dtype(monkeypatch):
    monkeypatch.setattr(roofline, "_measured", {})
    monkeypatch.setattr(roofline, "SIDE", {"cpu": 64})
    monkeypatch.setattr(roofline, "COPIED", {"cpu": 2**16})
    needs = {"live_gflop": 1.0, "floor_mb": 1.0}

    def start(dtype, columns):
        work = lambda: torch.empty(2**18)
        return lambda shared: runner.Runnable(work, lambda: columns, dtype=dtype)

    group = a_group(
        runner.Provider("plain", start("fp32", needs)),
        runner.Provider("narrow", start("bf16", needs)),
        runner.Provider("no counts", start("fp32", {})),
    )
    outcomes = runner.run_group(group, {"plain", "narrow", "no counts"}, SETTINGS)
    plain, narrow, rest = (outcomes[name].columns for name in ("plain", "narrow", "no counts"))
    assert rest == {"peak_mb": 2**20 / 1e6}
    ceilings = roofline.measured()
    assert list(ceilings) == ["bf16 product TFLOP/s", "copy GB/s", "fp32 product TFLOP/s"]
    for row, dtype in ((plain, "fp32"), (narrow, "bf16")):
        assert row["peak_tflops"] == pytest.approx(ceilings[f"{dtype} product TFLOP/s"], rel=0.01)
        assert row["peak_gbps"] == pytest.approx(ceilings["copy GB/s"], rel=0.01)
    smoke = runner.run_group(group, {"plain"}, replace(SETTINGS, size="smoke"))["plain"].columns
    assert smoke == needs


def test_a_ceiling_is_its_amount_over_the_median_of_its_clock(monkeypatch):
    """Runs of 1, 9, 2, 2 ... seconds: one interruption changes nothing."""
    monkeypatch.setattr(roofline, "_measured", {})
    monkeypatch.setattr(roofline, "SIDE", {"cpu": 100})
    lengths = iter([1.0, 9.0, *[2.0] * 20])
    measured = []

    def measure(work, device):
        measured.append(next(lengths))
        return timing.Sample(measured[-1], 0.5 * measured[-1])

    monkeypatch.setattr(timing, "measure", measure)
    assert roofline.product_tflops("fp32", CPU, "wall") == pytest.approx(2e6 / 2.0 / 1e12)
    count = len(measured)
    assert 3 <= count <= roofline.RUNS
    roofline.product_tflops("fp32", CPU, "wall")
    assert len(measured) == count
    assert roofline.product_tflops("fp32", CPU, "process") == pytest.approx(2e6 / 1.0 / 1e12)


def test_times_are_medians_of_ratios_within_rounds():
    base = results.Row("g", "base", [1.0, 10.0, 100.0])
    row = results.Row("g", "row", [0.5, 5.0, 20.0])
    assert base.times(row) == (2.0, 2.0, pytest.approx(3.8))
    assert base.times(base) == (1.0, 1.0, 1.0)
    assert results.spread([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == (2.0, 5.0)
    assert results.spread([1.0]) == (1.0, 1.0)


def test_table_shows_times_rates_shares_and_reasons():
    columns = {"saved_mb_per_image": 67.74, "live_gflop": 200.0, "floor_mb": 1e3, "images": 64.0}
    ceilings = {"peak_tflops": 4.0, "peak_gbps": 20.0}
    step = ("process", "step", ("plain",))
    rows = [
        results.Row("g/P5", "plain", [0.2, 0.2], "", *step),
        results.Row("g/P5", "pae", [0.1, 0.1], "", *step, columns | ceilings),
        results.Row("g/P5", "absent", reason="not installed"),
        results.Row("g/P5", "wrong", reason="failed: gradients are off"),
    ]
    run = results.Run("", "", {"cores": 2}, {"g/P5": rows}, {"other": "runs with --full"})
    text = table.render(run)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    head, _, plain, ours = ([cell.strip() for cell in x.strip("|").split("|")] for x in lines)
    assert head[5:] == [
        *("saved MB/image", "images/s", "live GFLOP/s", "of product", "floor GB/s", "of copy")
    ]
    assert plain == ["g, 5 prompts", "plain", "2.00x", "200", "200-200", *[""] * 6]
    assert ours[:5] == ["", "**pae**", "**1x**", "100", "100-100"]
    assert ours[5:] == ["67.7", "640.0", "2000", "50%", "10", "50%"]
    assert len({len(line) for line in lines}) == 1  # aligned
    assert text.startswith("cores 2\n") and "Left out: absent (not installed)" in text
    assert "**Failed**:\n- g/P5, wrong: failed: gradients are off" in text
    assert "Left out (runs with --full):\n- other" in text


def a_run(device="H200", rows=1, summary=None, **left_out):
    summary = {"device": device, "torch": "2.11", "commit": "abc"} | (summary or {})
    return {
        "machine_info": {"summary": summary},
        "benchmarks": [{"group": "g"}] * rows,
        "left_out": {"groups": left_out, "providers": []},
    }


def test_merged_runs_keep_all_rows_and_say_what_became_of_the_tests():
    whole = merge.merge([a_run(rows=2, a="x"), a_run(b="y", g="z")], {"tests": "failed"})
    assert len(whole["benchmarks"]) == 3
    assert whole["left_out"]["groups"] == {"a": "x", "b": "y"}  # g was measured in the other run
    assert whole["machine_info"]["summary"]["tests"] == "failed"
    with pytest.raises(ValueError, match="runs differ in device: H200 in A, H100 in B"):
        merge.merge([a_run(), a_run("H100")], {})
    for name, other in (("threads", 2), ("clock", "wall")):
        with pytest.raises(ValueError, match=f"runs differ in {name}: unknown in A, {other} in B"):
            merge.merge([a_run(), a_run(summary={name: other})], {})
    later = a_run(summary={"bf16 product TFLOP/s": 0.1})
    assert "bf16 product TFLOP/s" in merge.merge([a_run(), later], {})["machine_info"]["summary"]
    with pytest.raises(ValueError, match="runs must be at least one"):
        merge.merge([], {})
