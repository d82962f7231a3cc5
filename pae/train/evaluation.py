"""How good a trained model is on labelled images: accuracy with an interval, per class, and who is
taken for whom.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pae.files import signed, to_json, write_atomically
from pae.train import clips
from pae.train.data import Images
from pae.train.layouts import folder_of, read_data
from pae.train.listing import shown, some
from pae.train.runfolder import write_bytes
from pae.train.stored import Columns
from pae.train.tfds import INFO
from pae.train.using import Loaded, match, predictions, top

SPLITS = ("train", "val", "test")
Naming = Callable[[Sequence[str], Sequence[str], str], "list[str | None]"]
Z = 1.959963984540054  # 95 % of a normal distribution lie within so many standard deviations


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a share, of `hits` among `count`; (0, 1) of none.

    Source: Wilson, Probable inference, JASA 22 (1927): the shares p whose normal approximation
    with p's own variance does not refuse what was seen; unlike the simple one it stays within
    [0, 1] and keeps its width where all or none hit.
    """
    if count == 0:
        return 0.0, 1.0
    share, z2 = hits / count, Z * Z
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass
class Evaluation:
    """What `evaluate` found.

    Attributes:
        classes: names, in the order of `confusion`.
        confusion: (classes, classes) int64: images of class i that were taken for class j.
        unread: (image, why) of those that could not be read; they count nowhere else.
        rows: per image: path, label, predicted class, its probability; in the order given.
    """

    classes: Sequence[str]
    confusion: Tensor
    unread: list[tuple[Any, str]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Images that were read."""
        return int(self.confusion.sum())

    @property
    def hits(self) -> int:
        """Images that were taken for what they are."""
        return int(self.confusion.diagonal().sum())

    @property
    def accuracy(self) -> float:
        """Share of `hits`; NaN of no image."""
        return self.hits / self.count if self.count else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of `accuracy`; see `wilson`."""
        return wilson(self.hits, self.count)

    def per_class(self) -> list[dict[str, Any]]:
        """A row per class: "class", "images", "correct", "accuracy" (None of none), "low", "high"
        (its interval), and "precision": of the images taken for it, those that are (None of none).
        """
        rows = []
        for i, name in enumerate(self.classes):
            images, taken = int(self.confusion[i].sum()), int(self.confusion[:, i].sum())
            correct = int(self.confusion[i, i])
            low, high = wilson(correct, images)
            rows.append(
                {
                    "class": name,
                    "images": images,
                    "correct": correct,
                    "accuracy": correct / images if images else None,
                    "low": low if images else None,
                    "high": high if images else None,
                    "precision": correct / taken if taken else None,
                }
            )
        return rows

    @property
    def mean_class_accuracy(self) -> float:
        """Mean over the classes that have images."""
        found = [row["accuracy"] for row in self.per_class() if row["accuracy"] is not None]
        return sum(found) / len(found) if found else math.nan

    def summary(self) -> str:
        """One line."""
        low, high = self.interval
        unread = f"; {len(self.unread)} images could not be read" if self.unread else ""
        return (
            f"accuracy {self.accuracy:.4f} ({self.hits} of {self.count}; 95 % interval {low:.4f} "
            f"to {high:.4f}), mean over classes {self.mean_class_accuracy:.4f}{unread}"
        )

    def write(self, folder: Path, **facts: Any) -> list[Path]:
        """evaluation.json, per_class.csv, confusion.csv, confusion.png and predictions.csv.

        Args:
            facts: of the model and the images, for evaluation.json.
        """
        low, high = self.interval
        table = {
            **facts,
            "images": self.count,
            "correct": self.hits,
            "accuracy": self.accuracy,
            "low": low,
            "high": high,
            "interval": "95 %, Wilson",
            "mean_class_accuracy": self.mean_class_accuracy,
            "unread": [{"image": str(item), "error": error} for item, error in self.unread],
        }
        confusion = [
            {"class": name, **dict(zip(self.classes, row.tolist()))}
            for name, row in zip(self.classes, self.confusion)
        ]
        files = {
            "per_class.csv": as_csv(self.per_class()),
            "confusion.csv": as_csv(confusion),
            "predictions.csv": as_csv(self.rows),
            "evaluation.json": to_json(signed(table), indent=2) + "\n",
        }
        for name, text in files.items():
            write_bytes(folder / name, text.encode())
        plot_confusion(folder / "confusion.png", self.classes, self.confusion, self.summary())
        return [folder / name for name in (*files, "confusion.png")]


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as CSV, their names on top; None is an empty cell."""
    table = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(table, fieldnames=names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue()


def evaluate(
    model: Loaded,
    images: Images,
    *,
    batch_size: int = 32,
    workers: int = 2,
    on_image: Callable[[], object] = lambda: None,
) -> Evaluation:
    """What the model makes of labelled images.

    Args:
        model: of `pae.load`, with a transform and classes.
        images: `labels` count the model's classes.
        batch_size, workers, on_image: as `using.predictions`.
    """
    classes = model.classes or tuple(map(str, range(model.num_classes)))
    found = Evaluation(classes, torch.zeros(len(classes), len(classes), dtype=torch.int64))
    how: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "on_image": on_image}
    for said, label in zip(predictions(model, list(images.items), **how), images.labels):
        row = {"image": str(said.item), "label": classes[label], "predicted": None}
        row |= {"probability": None, "error": said.error}
        if said.probabilities is None:
            found.unread.append((said.item, said.error or ""))
        else:
            ((name, probability),) = top(said.probabilities, classes, 1)
            row |= {"predicted": name, "probability": f"{probability:.6f}"}
            found.confusion[label, int(said.probabilities.argmax())] += 1
        found.rows.append(row)
    return found


def read_labelled(
    folder: str | Path,
    classes: Sequence[str],
    split: str | None,
    of_clips: bool = False,
    columns: Columns | None = None,
    naming: Naming | None = None,
) -> tuple[Images, str]:
    """The images of a folder in any layout of `pae train`, with the model's numbers as labels.

    Args:
        classes: of the model.
        of_clips: it reads those, and the folder holds them.
        split: which one; None: test, or val where there is none, or all of class folders alone.
        columns: see `pae.train.layouts.read_data`.
        naming: what the folder's classes, the model's and a name of the folder for messages are
            given to, and which of the model's the folder's are comes back, None of those whose
            images are left out; None: the same names.
    Returns:
        The images, and which split they are; "all" of class folders alone.
    Raises:
        ValueError: no such folder or split, or a class that the model does not know.
    """
    root = Path(os.path.expanduser(folder))
    if of_clips:
        own, splits, alone = clips.read_labelled(folder_of(os.fspath(folder)))
    else:
        own, listed, _ = read_data(folder, columns)[1]
        splits = {name: Images(list(found.paths), found.labels) for name, found in listed.items()}
        names = ("train", "training", "Train", "train.json", INFO)
        alone = list(splits) == ["train"] and root.is_dir()
        alone = alone and not any((root / name).exists() for name in names)
    if split is None:
        split = next((name for name in ("test", "val") if name in splits), "train")
        if split == "train" and not alone:
            raise ValueError(
                f"--data {shown(folder)}: has neither a test nor a val split; --split train "
                f"evaluates on its training {'clips' if of_clips else 'images'}"
            )
    if split not in splits:
        raise ValueError(f"--data {shown(folder)}: has no {split} split ({some(list(splits))})")
    where = f"--data {shown(folder)}"
    called = list(own) if naming is None else naming(own, classes, where)
    wanted = {i: name for i, name in enumerate(called) if name is not None}
    number = dict(zip(wanted, match(classes, list(wanted.values()), where)))
    found = splits[split]
    if len(wanted) < len(own):
        found = found.subset([i for i, label in enumerate(found.labels) if label in number])
    images = Images(found.items, [number[label] for label in found.labels])
    return images, "all" if alone else split


def plot_confusion(path: Path, classes: Sequence[str], confusion: Tensor, title: str) -> None:
    """Shares of every class's images (rows) by what they were taken for (columns), as a PNG.

    Numbers of images stand in the cells where there is room: up to 20 classes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(classes)
    side = min(20.0, max(4.5, 0.4 * count + 2.5))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    FigureCanvasAgg(figure)  # no display, and no global pyplot state
    axes = figure.subplots()
    shares = confusion.double() / confusion.sum(1, keepdim=True).clamp(min=1)
    image = axes.imshow(shares.numpy(), vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, ax=axes, label="share of the images of the class", shrink=0.8)
    if count <= 60:
        size = 9 if count <= 20 else 6
        names: dict[str, Any] = {"labels": classes, "fontsize": size, "parse_math": False}
        axes.set_xticks(range(count), rotation=90, **names)
        axes.set_yticks(range(count), **names)
    if count <= 20:
        for i in range(count):
            for j in range(count):
                if number := int(confusion[i, j]):
                    colour = "white" if shares[i, j] > 0.5 else "black"
                    place: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8}
                    axes.text(j, i, str(number), color=colour, **place)
    axes.set_xlabel("taken for")
    axes.set_ylabel("is")
    figure.suptitle(title.replace("), ", "),\n"), fontsize=9)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
