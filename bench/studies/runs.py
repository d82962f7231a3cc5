"""Training runs of a study: each in a folder of its own, finished ones never repeated.

A run is `pae train`'s own loop with its own recipe. Besides accuracy per epoch it leaves a trace
(`trace.json`): process time, and for every block the norm of the prompt gradient and its cosine
with the step before. Process time is what one core spent, data loading included: another program
on the machine does not change it much.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from pae.checkpoint import write_atomically
from pae.train import loop
from pae.train.data import stratified_cut
from pae.train.report import Reporter
from pae.train.runfolder import RunFolder
from pae.train.settings import Settings

SHARE = 0.95  # "converged" is this share of the final validation accuracy


@dataclass(frozen=True)
class Cell:
    """One run: `changes` to the default settings, on image set `dataset`, from `seed`; `on_start`
    is called with the module before training.
    """

    name: str
    dataset: str
    seed: int
    changes: dict
    on_start: Callable | None = None

    def folder(self, output: Path) -> RunFolder:
        return RunFolder(Path(output) / self.dataset / f"{self.name}-{self.seed}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every study may change: the seeds and the size of its runs."""
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--train-size", type=int, default=800)
    parser.add_argument("--val-size", type=int, default=200)
    parser.add_argument("--test-size", type=int, help="images of the test split (default: all)")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--img-size", type=int, help="pixels (default: the backbone's)")
    parser.add_argument("--mpa-images", type=int, default=8)


def sizes(arguments) -> dict:
    """The part of the settings that `add_arguments` gives."""
    names = ("train_size", "val_size", "epochs", "img_size", "mpa_images")
    return {name: getattr(arguments, name) for name in names}


def run(cells: Iterable[Cell], output: Path, test_size: int | None, **common) -> None:
    """Train every cell that has no result yet. One that was interrupted begins anew."""
    cells = list(cells)
    for number, cell in enumerate(cells, 1):
        folder = cell.folder(output)
        if folder.result() is not None:
            continue
        try:  # several processes may share one output; the folder's maker owns the run
            folder.path.mkdir(parents=True)
        except FileExistsError:
            print(f"{folder.path} is another process's, or was interrupted: left alone", flush=True)
            continue
        settings = Settings(
            dataset=cell.dataset, seed=cell.seed, workers=0, **{**common, **cell.changes}
        ).resolved()
        task = load_task(settings, test_size)
        trace = Trace()
        result = loop.train(
            settings,
            task,
            folder,
            loop.make_accelerator(settings),
            Reporter(quiet=True),
            on_start=cell.on_start,
            on_backward=trace,
        )
        trace.write(folder.path / "trace.json")
        for heavy in (folder.state, folder.previous_state):
            heavy.unlink(missing_ok=True)
        print(
            f"{number}/{len(cells)} {cell.dataset} {cell.name} seed {cell.seed}: test "
            f"{result['test_accuracy']:.3f}, {trace.seconds[-1]:.0f} s",
            flush=True,
        )


def load_task(settings: Settings, test_size: int | None = None):
    """The task of the settings, with at most `test_size` test images, the same for every seed."""
    task = loop.load_task(settings)
    if test_size is None or test_size >= len(task.test):
        return task
    (kept,) = stratified_cut(task.test.labels, [test_size], seed=0)
    return dataclasses.replace(task, test=task.test.subset(kept))


def clear_unfinished(output: Path) -> None:
    """Remove the folders of interrupted runs, so that they can begin anew."""
    for path in Path(output).glob("*/*/"):
        if RunFolder(path).result() is None:
            shutil.rmtree(path)
            print(f"{path}: unfinished, removed")


class Trace:
    """What happens to the prompts' gradient, step by step; the `on_backward` of a run."""

    def __init__(self):
        self.began = time.process_time()
        self.seconds: list[float] = []
        self.norms: list[list[float]] = []
        self.cosines: list[list[float]] = []
        self._before = None

    def __call__(self, module, update: int) -> None:
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

        def short(rows):
            return [[float(f"{v:.5g}") for v in row] for row in rows]

        write_json(
            path,
            {
                "process_seconds": [round(s, 3) for s in self.seconds],
                "gradient_norm": short(self.norms),
                "cosine_with_last": short(self.cosines),
            },
            indent=None,
        )


def collect(cells: Iterable[Cell], output: Path) -> dict[tuple[str, str], list[dict]]:
    """Finished runs: (dataset, name) -> one record per seed, in the order of `cells`."""
    found: dict[tuple[str, str], list[dict]] = {}
    for cell in cells:
        folder = cell.folder(output)
        result = folder.result()
        if result is None:
            continue
        rows, trace = folder.rows(), json.loads((folder.path / "trace.json").read_text())
        val = [row["val_accuracy"] for row in rows]
        converged = epochs_to_share(val)
        steps = len(trace["process_seconds"]) // len(rows)
        found.setdefault((cell.dataset, cell.name), []).append(
            {
                "seed": cell.seed,
                "test": result["test_accuracy"],
                "val": val,
                "loss": [row["train_loss"] for row in rows],
                "converged": converged,
                "converged_seconds": trace["process_seconds"][converged * steps - 1],
                "seconds": trace["process_seconds"][-1],
                "parameters": result["trained_parameters"],
                "trace": trace,
            }
        )
    return found


def facts(cells: Iterable[Cell], output: Path) -> dict:
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


def epochs_to_share(accuracies: list[float], share: float = SHARE) -> int:
    """First epoch (from 1) whose validation accuracy reaches `share` of the last one's."""
    return next(i for i, a in enumerate(accuracies, 1) if a >= share * accuracies[-1])


def bootstrap(values: list[float], draws: int = 10000) -> tuple[float, float]:
    """95 % percentile interval of the mean, resampling seeds.

    With n seeds it is the spread of n numbers: honest about them, not about the seeds not run.
    """
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor(values, dtype=torch.float64)
    index = torch.randint(len(values), (draws, len(values)), generator=generator)
    means = values[index].mean(dim=1)
    return tuple(torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist())


def paired(records: list[dict], baseline: list[dict], key: str = "test") -> dict | None:
    """Mean difference over the seeds that both have, and its interval; None if they share none."""
    before = {r["seed"]: r[key] for r in baseline}
    gains = [r[key] - before[r["seed"]] for r in records if r["seed"] in before]
    if not gains:
        return None
    low, high = bootstrap(gains)
    return {"mean": statistics.mean(gains), "low": low, "high": high, "seeds": len(gains)}


def write_json(path: Path, value, indent: int | None = 1) -> None:
    text = json.dumps(value, indent=indent)
    write_atomically(Path(path), lambda p: p.write_text(text + "\n"))
