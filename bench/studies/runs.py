"""What the studies share: training runs in folders of their own, trained once; means and intervals
over seeds; command lines and Markdown.

A run is `pae train`'s own loop with its own recipe. Besides accuracy per epoch it leaves a trace
(`trace.json`): process time, and for every block the norm of the prompt gradient and its cosine
with the step before. Process time is what one core spent, data loading included: another program
on the machine does not change it much.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pae.checkpoint import write_atomically
from pae.train import loop
from pae.train.data import stratified_cut
from pae.train.options import Options
from pae.train.report import Reporter
from pae.train.runfolder import RunFolder

SHARE = 0.95  # "converged" is this share of the final validation accuracy
RESULTS = Path("bench/results/science")

# ---- the command line


def main(
    study: str,
    commands: Mapping[str, Callable[[argparse.Namespace], None]],
    options: Callable[[str, argparse.ArgumentParser], None],
    seeds: int = 3,
) -> None:
    """`python -m bench.studies.STUDY COMMAND --output FOLDER ...`; `options` adds the study's own
    to each command, by name.
    """
    parser = argparse.ArgumentParser(prog=f"python -m bench.studies.{study}")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, work in commands.items():
        command = subparsers.add_parser(name)
        command.set_defaults(work=work)
        add = command.add_argument
        add("--output", required=True, type=Path, help="folder of the runs")
        if name in ("run", "report"):
            add("--seeds", nargs="+", type=int, default=list(range(seeds)))
        if name == "run":
            add("--train-size", type=int, default=800)
            add("--val-size", type=int, default=200)
            add("--test-size", type=int, help="images of the test split (default: all)")
            add("--epochs", type=int, default=10)
            add("--img-size", type=int, help="pixels (default: the backbone's)")
            add("--mpa-images", type=int, default=8)
        if name == "report":
            add("--to", type=Path, default=RESULTS, help="folder of the numbers")
        options(name, command)
    arguments = parser.parse_args()
    arguments.work(arguments)


def sizes(arguments: argparse.Namespace) -> dict[str, Any]:
    """The part of the settings that the options of "run" give."""
    names = ("train_size", "val_size", "epochs", "img_size", "mpa_images")
    return {name: getattr(arguments, name) for name in names}


# ---- runs


@dataclass(frozen=True)
class Cell:
    """One run: `changes` to the default settings, on image set `dataset`, from `seed`; `on_start`
    is called with the module before training.
    """

    name: str
    dataset: str
    seed: int
    changes: dict[str, Any]
    on_start: Callable[[nn.Module], None] | None = None

    def folder(self, output: Path) -> RunFolder:
        return RunFolder(Path(output) / self.dataset / f"{self.name}-{self.seed}")

    def settings(self, **common: Any) -> Options:
        chosen = {"dataset": self.dataset, "method": "vpt-deep", "seed": self.seed}
        return Options(**{**chosen, **common, **self.changes}).resolved()


def run(cells: Iterable[Cell], output: Path, test_size: int | None, **common: Any) -> None:
    """Train every cell whose folder is not there yet."""
    cells = list(cells)
    for number, cell in enumerate(cells, 1):
        folder = cell.folder(output)
        if folder.result() is not None:
            continue
        try:  # several processes may share one output; the folder's maker owns the run
            folder.path.mkdir(parents=True)
        except FileExistsError:
            print(f"{folder.path}: left alone, another process's or interrupted", flush=True)
            continue
        settings = cell.settings(workers=0, **common)
        task, trace = load_task(settings, test_size), Trace()
        place = folder, loop.make_accelerator(settings), Reporter(quiet=True)
        hooks = {"on_start": cell.on_start, "on_backward": trace}
        result = loop.train(settings, task, *place, **hooks)
        trace.write(folder.path / "trace.json")
        for heavy in (folder.state, folder.previous_state):
            heavy.unlink(missing_ok=True)
        print(
            f"{number}/{len(cells)} {cell.dataset} {cell.name} seed {cell.seed}: test "
            f"{result['test_accuracy']:.3f}, {trace.seconds[-1]:.0f} s",
            flush=True,
        )


def load_task(settings: Options, test_size: int | None = None) -> Any:
    """The task of the settings, with at most `test_size` test images, the same for every seed."""
    task = loop.load_task(settings)
    if test_size is None or test_size >= len(task.test):
        return task
    (kept,) = stratified_cut(task.test.labels, [test_size], seed=0)
    return dataclasses.replace(task, test=task.test.subset(kept))


class Trace:
    """What happens to the prompts' gradient, step by step; the `on_backward` of a run."""

    def __init__(self) -> None:
        self.began = time.process_time()
        self.seconds: list[float] = []
        self.norms: list[list[float]] = []
        self.cosines: list[list[float]] = []
        self._before: Tensor | None = None

    def __call__(self, module: nn.Module, update: int) -> None:
        self.seconds.append(time.process_time() - self.began)
        gradient = getattr(getattr(module.prompts, "tokens", None), "grad", None)
        if gradient is None or gradient.dim() != 3:  # (depth, P, D) alone has a row per block
            return
        gradient = gradient.detach().flatten(1).double().cpu()
        norms = gradient.norm(dim=1)
        unit = gradient / norms.clamp_min(torch.finfo(norms.dtype).tiny)[:, None]
        self.norms.append(norms.tolist())
        if self._before is not None:
            self.cosines.append((unit * self._before).sum(1).tolist())
        self._before = unit

    def write(self, path: Path) -> None:
        """Five digits are plenty for a figure."""
        trace = {"process_seconds": [round(s, 3) for s in self.seconds]}
        for name, rows in (("gradient_norm", self.norms), ("cosine_with_last", self.cosines)):
            trace[name] = [[float(f"{v:.5g}") for v in row] for row in rows]
        write_json(path, trace, indent=None)


# ---- from runs to numbers


def collect(cells: Iterable[Cell], output: Path) -> dict[tuple[str, str], list[dict]]:
    """Finished runs: (dataset, name) -> one record per seed, in the order of `cells`.

    Raises:
        SystemExit: there is none.
    """
    found: dict[tuple[str, str], list[dict]] = {}
    for cell in cells:
        folder = cell.folder(output)
        result = folder.result()
        if result is None:
            continue
        rows, trace = folder.rows(), json.loads((folder.path / "trace.json").read_text())
        val, seconds = [row["val_accuracy"] for row in rows], trace["process_seconds"]
        converged = first_at(val, SHARE * val[-1])
        record = {
            "seed": cell.seed,
            "test": result["test_accuracy"],
            "val": val,
            "converged": converged,
            "converged_seconds": seconds[converged * (len(seconds) // len(rows)) - 1],
            "seconds": seconds[-1],
            "parameters": result["trained_parameters"],
            "trace": trace,
        }
        found.setdefault((cell.dataset, cell.name), []).append(record)
    if not found:
        raise SystemExit(f"--output {output}: no finished run there")
    return found


def facts(cells: Iterable[Cell], output: Path) -> dict[str, Any]:
    """What all runs share, read from the first finished one; sizes per image set."""
    keep = ("model", "img_size", "epochs", "num_tokens", "optimizer", "lr", "batch_size")
    shared, tasks = {}, {}
    for cell in cells:
        folder = cell.folder(output)
        if cell.dataset in tasks or folder.result() is None:
            continue
        read = json.loads(folder.config.read_text())
        tasks[cell.dataset] = {
            "classes": len(read["task"]["classes"]),
            **{k: read["task"][k] for k in ("train", "val", "test")},
        }
        shared = {k: read["settings"][k] for k in keep} | {"versions": read["versions"]}
    return {**shared, "tasks": tasks}


def summary(records: list[dict]) -> dict[str, Any]:
    """What all studies show of one arm's runs."""
    tests = [r["test"] for r in records]
    return {
        "seeds": [r["seed"] for r in records],
        "tests": tests,
        "test": interval(tests),
        "val": [statistics.mean(v) for v in zip(*(r["val"] for r in records))],
        "parameters": records[0]["parameters"],
    }


def first_at(accuracies: list[float], target: float) -> int:
    """First epoch (from 1) whose accuracy is at least `target`; the last one if none is."""
    return next((i for i, a in enumerate(accuracies, 1) if a >= target), len(accuracies))


def bootstrap(values: list[float], draws: int = 10000) -> tuple[float, float]:
    """95 % percentile interval of the mean, resampling seeds.

    With n seeds it is the spread of n numbers: honest about them, not about the seeds not run.
    """
    drawn = torch.tensor(values, dtype=torch.float64)
    return ends(drawn[resampled(len(drawn), draws)].mean(dim=1))


def resampled(seeds: int, draws: int = 10000) -> Tensor:
    """(draws, seeds) indices, with replacement, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(seeds, (draws, seeds), generator=generator)


def ends(drawn: Tensor) -> tuple[float, float]:
    """The 95 % percentile interval of what was drawn."""
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return low, high


def interval(values: list[float]) -> dict[str, float] | None:
    """Mean and bootstrap interval to four digits, and of how many; None of none."""
    if not values:
        return None
    found = {"mean": statistics.mean(values), **dict(zip(("low", "high"), bootstrap(values)))}
    return {**{name: short(value) for name, value in found.items()}, "seeds": len(values)}


def short(value: float) -> float:
    return float(f"{value:.4g}")


def paired(records: list[dict], baseline: list[dict], key: str = "test") -> dict | None:
    """The `interval` of the differences over the seeds that both have."""
    before = {r["seed"]: r[key] for r in baseline}
    return interval([r[key] - before[r["seed"]] for r in records if r["seed"] in before])


# ---- from numbers to files and text


def write_json(path: Path, value: object, indent: int | None = 1) -> None:
    """The folder too."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=indent)
    write_atomically(Path(path), lambda p: p.write_text(text + "\n"))


def shown(value: Mapping[str, float] | None, form: str) -> str:
    """A mean and its interval in the format `form`; nothing for None."""
    if value is None:
        return ""
    return f"{value['mean']:{form}} ({value['low']:{form}} to {value['high']:{form}})"
