"""Would products in int8 make a step faster, and what would they cost? A study, not a product.

    python -m bench.studies.int8 time --output runs/int8
    python -m bench.studies.int8 run --output runs/int8 --epochs 4 --img-size 84 \
        --train-size 240 --val-size 100 --test-size 500
    python -m bench.studies.int8 report --output runs/int8

The frozen weights of a plan get codes of 8 bits, a scale for each output channel; each
column of the rows a static one, from the first batch. oneDNN multiplies (`qlinear_pointwise`,
weights packed once). "fused" writes the codes inside the norm and the GELU before the product, in
`int8.cpp`, compiled here. With "both", gradients are multiplied in int8 too, each row with a scale
of its own. Attention, norms, the stream, prompts' keys and a last block of one row are left alone.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import functools
import json
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from timm.data import resolve_data_config
from torch import Tensor

import pae
import pae.plan
from bench.bench_step import Case, Step, open_step
from bench.shapes import BASE, DEMO, random_backbone
from bench.table import table_of
from bench.timing import interleave
from pae import block as frozen
from pae.train import methods, pixels
from pae_kernels import pointwise

from . import runs

CPU = torch.device("cpu")
KINDS = {torch.float32: 0, torch.bfloat16: 2}
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-Wno-psabi"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
JSON = "int8.json"
# columns of the tables; errors are norm-relative
FORMATS = {
    "ms": ".1f",
    "times fp32": ".2f",
    "error": ".1e",
    "error of logits": ".1e",
    "of the prompts' gradient": ".1e",
    "its cosine": ".5f",
    "its length": ".4f",
}

SHARE = 0.7  # of the unevenness of columns that the weights take over
FORWARD = {"fused": True, "backward": False, "columns": True}
# name -> dtype of the plan, and the options of `arm` where products run in int8
ARMS: dict[str, tuple[str, dict[str, bool] | None]] = {
    "fp32": ("fp32", None),
    "bf16": ("bf16", None),
    "int8 forward, one scale": ("fp32", FORWARD | {"columns": False}),
    "int8 forward, unfused": ("fp32", FORWARD | {"fused": False}),
    "int8 forward": ("fp32", FORWARD),
    "int8 both": ("fp32", FORWARD | {"backward": True}),
    "int8 both, the rest bf16": ("bf16", FORWARD | {"backward": True}),
}
TRAINED = ("fp32", "bf16", "int8 forward", "int8 both")
CASES: dict[str, Case | str] = {  # a string: the first batch of a task, with trained weights
    "ViT-B/16, 197 rows, P = 50, batch 4": Case(BASE, 50, "fp32", 4),
    "ViT-S/14, 65 rows, P = 10, batch 16": Case(DEMO, 10, "fp32", 16, image=112),
    "the task's ViT-S/14, 37 rows, P = 10, batch 16": "fashion-mnist",
}
TASK = {"train_size": 240, "val_size": 100, "epochs": 4, "img_size": 84}


@functools.cache
def kernels() -> ctypes.CDLL:
    """`int8.cpp`, compiled for this processor.

    Raises:
        SystemExit: it has no dot products of 8 bits, without which oneDNN's sums may overflow.
    """
    if not torch.cpu._is_vnni_supported():
        raise SystemExit("bench.studies.int8 needs a processor with VNNI, and this one has none")
    source, include = Path(__file__).with_suffix(".cpp"), Path(pae.__file__).parents[1] / "csrc/cpu"
    with tempfile.TemporaryDirectory() as scratch:
        library = Path(scratch, "int8.so")
        subprocess.run(["c++", *FLAGS, f"-I{include}", source, "-o", library], check=True)
        return ctypes.CDLL(str(library))


def call(name: str, *arguments: Any) -> None:
    """Tensors stand for their addresses, and have to be contiguous."""
    as_c = {float: ctypes.c_float, int: ctypes.c_int64}
    assert all(a.is_contiguous() for a in arguments if isinstance(a, Tensor))
    given = [
        ctypes.c_void_p(a.data_ptr() if isinstance(a, Tensor) else a)
        if a is None or isinstance(a, Tensor)
        else as_c[type(a)](a)
        for a in arguments
    ]
    getattr(kernels(), name)(*given)


class Packed:
    """W (N, K) in int8 as oneDNN reads it, one scale for each of its N rows."""

    def __init__(self, weight: Tensor) -> None:
        wide = weight.float()
        self.scales = wide.abs().amax(1).clamp_min(1e-30) / 127
        codes = (wide / self.scales[:, None]).round().to(torch.int8).contiguous()
        self.codes = torch.ops.onednn.qlinear_prepack(codes, None)
        self.zeros = torch.zeros(len(weight), dtype=torch.int32)

    def __call__(
        self, codes: Tensor, scale: float, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """scale (codes - 128) W^T + bias in `dtype`. Signed codes would take oneDNN's slow way."""
        weight = self.codes, self.scales, self.zeros, bias
        return torch.ops.onednn.qlinear_pointwise(
            codes, scale, 128, *weight, 1.0, 0, dtype, "none", [], "none"
        )


class Weight:
    """A frozen weight that stands in a plan for `wide` (N, K): its products run in int8.

    Attributes:
        inverse: (K,) one over the scale of each column of the rows; None before the first of them.
    """

    def __init__(
        self, wide: Tensor, bias: Tensor, fused: bool, backward: bool, columns: bool
    ) -> None:
        self.wide, self.bias, self.fused, self.columns = wide, bias.float(), fused, columns
        self.dtype, self.inverse = wide.dtype, None
        self.backward = Packed(wide.t()) if backward else None

    @property
    def known(self) -> bool:
        """Whether the pass before the product may write its codes."""
        return self.fused and self.inverse is not None

    def see(self, rows: Tensor) -> None:
        """Set the scales by the first rows: the largest of a column (to the power of `SHARE`, over
        the largest of the weight's to what is left) is made even, and the weight makes up for it.
        """
        wide, most = self.wide.float(), rows.detach().float().abs().flatten(0, -2).amax(0)
        even = torch.ones_like(most)
        if self.columns:
            even = most.clamp_min(1e-3) ** SHARE / wide.abs().amax(0).clamp_min(1e-6) ** (1 - SHARE)
        self.scale = (most / even).amax().clamp_min(1e-30).item() / 127
        self.inverse = 1 / (self.scale * even)
        self.forward = Packed(wide * even)

    def rows(self, rows: Tensor, act: int = 0) -> Tensor:
        """rows W^T + b, or GELU(rows) W^T + b where the scales are known."""
        if self.inverse is None:
            self.see(rows)
        if self.fused:
            rows, codes = rows.contiguous(), torch.empty_like(rows, dtype=torch.uint8)
            sizes = rows.shape[:-1].numel(), rows.shape[-1]
            call("column_codes", KINDS[rows.dtype], act, rows, codes, self.inverse, *sizes)
        else:
            nearest = (rows * self.inverse).round_().clamp_(-127, 127)
            codes = nearest.add_(128).to(torch.uint8)
        return self.product(codes)

    def product(self, codes: Tensor) -> Tensor:
        return self.forward(codes, self.scale, self.bias, self.dtype)

    def __getitem__(self, rows: slice) -> Tensor:
        """Of `wide`, for prompts' keys and values."""
        return self.wide[rows]

    def __rmatmul__(self, d: Tensor) -> Tensor:
        """d W, as a backward asks for it."""
        if self.backward is None:
            return d @ self.wide
        d = d.contiguous()
        codes = torch.empty_like(d, dtype=torch.uint8)
        scales = d.new_empty((*d.shape[:-1], 1), dtype=torch.float32)
        call("rows_codes", KINDS[d.dtype], d, codes, scales, scales.numel(), d.shape[-1])
        return self.backward(codes, 1.0, None, d.dtype).mul_(scales)


def norm(
    x: Tensor, pending: Tensor | None, plain: pae.plan.PlainNorm, weight: Weight
) -> tuple[Tensor, ...]:
    """x + pending, its normalised rows and 1/std as the engine has them, and their product."""
    if not weight.known:
        y, xhat, rstd = frozen._sum_and_norm(x, pending, plain, weight.dtype)
        return y, xhat, rstd, weight.rows(xhat)
    x = x.contiguous()
    y = x if pending is None else torch.empty_like(x)
    xhat, codes = (torch.empty_like(x, dtype=t) for t in (weight.dtype, torch.uint8))
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    kinds, sizes = (KINDS[x.dtype], KINDS[xhat.dtype]), (rstd.numel(), x.shape[-1])
    pending = None if pending is None else pending.contiguous()
    call("norm_codes", *kinds, x, pending, y, xhat, rstd, codes, weight.inverse, plain.eps, *sizes)
    return y, xhat, rstd, weight.product(codes)


def attention_half(block, stream, keys, class_only=False, steps=frozen.AS_A_BACKWARD_NEEDS):
    """As `pae.block.attention_half`, for all rows: the last block of one row is another's."""
    x, xhat, rstd, qkv = norm(stream.rows, stream.pending, block.norm1, block.w_qkv)
    qkv = qkv.view(*xhat.shape[:2], 3, block.num_heads, block.head_width)
    out, lse = steps.attention(xhat, qkv, keys, class_only, None)
    kept = frozen.AttentionKept(xhat, rstd, qkv, lse, frozen.HeadNorms())
    return x, out, kept


def mlp_half(block, x, out, memory="keep", steps=frozen.AS_A_BACKWARD_NEEDS, entered=None):
    """As `pae.block.mlp_half`, memory mode "keep"."""
    y, xhat, rstd, hidden = norm(x, block.w_proj.rows(out), block.norm2, block.w_fc1)
    if block.w_fc2.known and block.activation == "gelu":
        rows = block.w_fc2.rows(hidden, act=1)
    else:
        rows = block.w_fc2.rows(pointwise.activation(hidden, block.activation)[0])
    return y, rows, frozen.MLPKept(xhat, rstd, hidden)


def quantised(plan: pae.plan.FrozenPlan, **options: bool) -> pae.plan.FrozenPlan:
    """`plan` with a `Weight` in place of every weight, but for a last block of one row."""

    def of(block: pae.plan.BlockPlan) -> pae.plan.BlockPlan:
        others = (block.q_norm, block.k_norm, block.norm_out, block.norm_hidden, block.affine2)
        others += block.post1, block.post2, block.gated, block.parallel
        assert not any(others), "plain blocks alone"
        assert block.rotation is None and block.bias is None, "no rotations or biases here"
        for one in (block.norm1, block.norm2):
            assert one is not None and not one.rms, "blocks with two LayerNorms alone"
        names = "qkv", "proj", "fc1", "fc2"
        return replace(block, **{f"w_{n}": Weight(*block.product(n), **options) for n in names})

    last = len(plan.blocks) - plan.class_only
    return replace(plan, blocks=[*map(of, plan.blocks[:last]), *plan.blocks[last:]])


@contextlib.contextmanager
def arm(options: dict[str, bool] | None) -> Iterator[None]:
    """Plans folded in here multiply in int8; without options nothing changes."""
    if options is None:
        yield
        return
    kernels()
    fold, plain = pae.plan.fold, (frozen.attention_half, frozen.mlp_half)

    def either(ours: Callable, theirs: Callable) -> Callable:
        return lambda block, *a, **k: (ours if isinstance(block.w_fc1, Weight) else theirs)(
            block, *a, **k
        )

    with (
        mock.patch.object(pae.plan, "fold", lambda *a: quantised(fold(*a), **options)),
        mock.patch.object(frozen, "attention_half", either(attention_half, plain[0])),
        mock.patch.object(frozen, "mlp_half", either(mlp_half, plain[1])),
    ):
        yield


# ---- accuracy


def cells(
    dataset: str, arms: Iterable[str], seeds: Iterable[int]
) -> Iterator[tuple[str, runs.Cell]]:
    for seed in seeds:
        for name in arms:
            amp = "no" if ARMS[name][0] == "fp32" else "bf16"
            yield name, runs.Cell(name.replace(" ", "-"), dataset, seed, {"amp": amp})


def run(arguments: argparse.Namespace) -> None:
    for name, cell in cells(arguments.dataset, arguments.arms, arguments.seeds):
        AcceleratorState._reset_state()  # it would hold a process to its first precision
        with arm(ARMS[name][1]):
            runs.run([cell], arguments.output, arguments.test_size, **runs.sizes(arguments))


# ---- times and errors


def time(arguments: argparse.Namespace) -> None:
    """One training step of every arm, and the products of its blocks alone, in turns; what there is
    of other cases is kept.
    """
    from cpuinfo import get_cpu_info  # comes with pytest-benchmark

    path, rounds = arguments.output / JSON, arguments.rounds
    parts = {"steps": {}, "products": {}, "rounds": {}}
    record = json.loads(path.read_text()) if path.exists() else parts
    record |= {"processor": get_cpu_info()["brand_raw"], "torch": torch.__version__}
    for name in arguments.cases:
        case, record["rounds"][name] = CASES[name], rounds
        step = task_step(case) if isinstance(case, str) else open_step(case, CPU)
        record["steps"][name] = steps(step, rounds, arguments.arms)
        if isinstance(case, Case):
            record["products"][name] = products(case, rounds)
        runs.write_json(path, record)
    print(_table(record["steps"]), _table(record["products"]), sep="\n\n")


def task_step(dataset: str) -> Step:
    """The first step of a run, with the reference engine's logits and gradient as what is right."""
    settings = runs.Cell("", dataset, 0, {"amp": "no"}).settings(**TASK)
    task = runs.load_task(settings)
    torch.manual_seed(0)
    model = methods.build_method(settings, len(task.classes)).train()
    config = resolve_data_config({}, model=model.backbone)
    transform, _ = pixels.make_transform("none", False, settings.img_size, "bicubic")
    split = pixels.PixelSplit(task.train, transform)
    images, labels = split.__getitems__(torch.arange(16))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in pixels.normalisation("model", config))
    step = Step(model, None, (images / 255 - mean) / std, labels, "fp32", None)
    logits = step.run(model, model).detach()
    return replace(step, expected={"logits": logits, "d_prompts": model.prompts.tokens.grad})


def steps(
    step: Step, rounds: int, arms: Iterable[str] = tuple(ARMS)
) -> dict[str, dict[str, float]]:
    """By arm: its time, and its errors."""
    works, found = {}, {}
    for name, (dtype, options) in ((arm, ARMS[arm]) for arm in arms):
        own = replace(step, model=copy.deepcopy(step.model), dtype=dtype)
        work = functools.partial(_work, own, options)
        work()  # folds, and finds the scales
        logits, d_prompts = work()
        found[name] = errors(step.expected, logits, d_prompts)
        works[name] = work
    return _timed(works, rounds, found)


def _work(step: Step, options: dict[str, bool] | None) -> tuple[Tensor, Tensor]:
    with arm(options):
        logits = step.run(functools.partial(pae.fast_forward, step.model), step.model)
    return logits, step.model.prompts.tokens.grad


def errors(expected: dict[str, Tensor], logits: Tensor, d_prompts: Tensor) -> dict[str, float]:
    """Of logits and of the prompts' gradient, against the official-style fp32 step."""
    good, g = expected["d_prompts"].double().flatten(), d_prompts.double().flatten()
    return {
        "error of logits": _apart(logits, expected["logits"]),
        "of the prompts' gradient": _apart(g, good),
        "its cosine": F.cosine_similarity(g, good, 0).item(),
        "its length": (g.norm() / good.norm()).item(),
    }


def _apart(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return ((a - b).norm() / b.norm()).item()


def products(case: Case, rounds: int) -> dict[str, dict[str, float]]:
    """The four forward products of a block on random weights and rows, by how they are run."""
    vit = random_backbone(case.backbone, CPU, depth=1, img_size=case.image or 224)
    count, d = case.batch * vit.pos_embed.shape[1], vit.embed_dim
    shapes = (3 * d, d), (d, d), (4 * d, d), (d, 4 * d)
    generator, given = torch.Generator().manual_seed(0), []
    for n, k in shapes:
        weight = torch.randn(n, k, generator=generator) / k**0.5
        given.append((torch.randn(count, k, generator=generator), weight, torch.zeros(n)))
    half = [[t.bfloat16() for t in g] for g in given]
    packed = [
        (x, torch.ops.mkldnn._reorder_linear_weight(w, count), b, "none", [], "")
        for x, w, b in half
    ]
    ours = [Weight(w, b, **FORWARD) for _, w, b in half]
    codes = [torch.randint(1, 256, x.shape, dtype=torch.uint8) for x, _, _ in given]
    signed = [
        (c.int().sub(128).to(torch.int8), w.mul(99).to(torch.int8).t())
        for c, (_, w, _) in zip(codes, given)
    ]
    works = {
        "fp32": lambda: [F.linear(*g) for g in given],
        "bf16": lambda: [F.linear(*g) for g in half],
        "bf16, packed": lambda: [torch.ops.mkldnn._linear_pointwise(*g) for g in packed],
        "int8 with a pass before": lambda: [w.rows(x) for w, (x, _, _) in zip(ours, half)],
        "int8, codes there": lambda: [w.product(c) for w, c in zip(ours, codes)],
        "int8, `torch._int_mm`": lambda: [torch._int_mm(*g) for g in signed],
    }
    exact, found = works["fp32"](), {}
    for name, work in works.items():
        results, known = work(), "there" not in name and "_int_mm" not in name
        found[name] = {"error": max(map(_apart, results, exact))} if known else {}
    return _timed(works, rounds, found)


def _timed(works: dict[str, Callable], rounds: int, found: dict[str, dict]) -> dict:
    """With "ms" and "times fp32", medians over rounds in turns, process time."""
    samples = interleave(works, rounds, CPU)
    seconds = {name: [s.process for s in seen] for name, seen in samples.items()}
    for name, mine in seconds.items():
        found[name]["ms"] = 1e3 * statistics.median(mine)
        found[name]["times fp32"] = statistics.median(a / b for a, b in zip(mine, seconds["fp32"]))
    return found


# ---- from numbers to text


def report(arguments: argparse.Namespace) -> None:
    """Write the numbers of finished runs beside those of `time`."""
    numbers = json.loads((arguments.output / JSON).read_text())
    chosen = [cell for _, cell in cells(arguments.dataset, TRAINED, arguments.seeds)]
    found = {name: records for (_, name), records in runs.collect(chosen, arguments.output).items()}
    base = found["fp32"]
    numbers["facts"] = runs.facts(chosen, arguments.output)
    numbers["accuracy"] = {
        name: {**runs.summary(records), "over fp32": runs.paired(records, base)}
        for name, records in found.items()
    }
    runs.write_json(arguments.to / JSON, numbers)


def blocks(numbers: dict) -> dict[str, str]:
    facts = numbers["facts"]
    ((name, task),) = facts["tasks"].items()
    setting = (
        f"{numbers['processor']}, torch {numbers['torch']}, one thread, process time, medians over "
        f"{' or '.join(map(str, sorted({*numbers['rounds'].values()})))} interleaved rounds. "
        f"Accuracy: {name}, {task['train']} training, "
        f"{task['val']} validation and {task['test']} test images, {facts['model']} at "
        f"{facts['img_size']} px, {facts['num_tokens']} prompts per block, "
        f"{facts['epochs']} epochs."
    )
    accuracy = [
        {
            "products": name.replace("-", " "),
            "test accuracy": f"{row['test']['mean']:.3f}",
            "every seed": ", ".join(f"{t:.3f}" for t in row["tests"]),
            "minus that of fp32": f"{row['over fp32']['mean']:+.3f}",
        }
        for name, row in numbers["accuracy"].items()
    ]
    gains = sorted(1 / found["int8 both"]["times fp32"] for found in numbers["steps"].values())
    return {
        "int8 gain": " to ".join(dict.fromkeys(f"{g:.1f}x" for g in (gains[0], gains[-1]))),
        "int8 setting": setting,
        "int8 products": _table(numbers["products"]),
        "int8 steps": _table(numbers["steps"]),
        "int8 accuracy": table_of(accuracy),
    }


def _table(cases: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = []
    for case, found in cases.items():
        columns = list(found["fp32"])
        for name, row in found.items():
            cells = {c: f"{row[c]:{FORMATS[c]}}" if c in row else "" for c in columns}
            lines.append({"shape": case if name == "fp32" else "", "": name, **cells})
    return table_of(lines)


def figures(numbers: dict) -> dict[str, Callable]:
    return {}


def options(name: str, command: argparse.ArgumentParser) -> None:
    if name == "time":
        command.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
        command.add_argument("--rounds", type=int, default=15)
    else:
        command.add_argument("--dataset", default="fashion-mnist")
    if name != "report":
        arms = list(TRAINED if name == "run" else ARMS)
        command.add_argument("--arms", nargs="+", default=arms, choices=arms)


if __name__ == "__main__":
    runs.main("int8", {"time": time, "run": run, "report": report}, options)
