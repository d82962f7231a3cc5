"""What may look on while a run trains: a few moments, in the main process alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from pae.train.declared import near
from pae.train.options import TRACKERS


class Callback:
    """Override what you want to hear of. An error in it ends the run, whose state is saved before.

    The module is the one that is trained, a `PromptedViT` unless the method is linear or full.
    """

    def on_train_begin(self, module: nn.Module, config: dict[str, Any], folder: Path) -> None:
        """Before the first step of this process; `config`: the options. Also when a run goes on."""

    def on_epoch_end(self, module: nn.Module, row: dict[str, Any]) -> None:
        """After an epoch is validated and saved; `row`: that of metrics.csv ("epoch", "train_loss",
        "train_accuracy", "val_loss", "val_accuracy", "lr", "seconds").
        """

    def on_train_end(self, module: nn.Module, result: dict[str, Any]) -> None:
        """After the test, with the tested weights; `result`: what the run folder keeps."""

    def close(self) -> None:
        """At the end of the run, also of one that failed or was interrupted."""


class Tracker(Callback):
    """The numbers of a run, into an experiment tracker that accelerate knows.

    Args:
        name: one of `TRACKERS`; the package of that name must be installed.

    Raises:
        ValueError: accelerate has no such tracker.
        ImportError: its package is missing.
    """

    def __init__(self, name: str) -> None:
        if name not in TRACKERS:
            raise ValueError(
                f"log_with: expected one of {', '.join(TRACKERS)}, got {name!r}"
                f"{near(name, TRACKERS)}"
            )
        from accelerate import tracking

        if name not in [str(found.value) for found in tracking.get_available_trackers()]:
            raise ImportError(f"--log-with {name}: its package is missing: pip install {name}")
        self._kind = tracking.LOGGER_TYPE_TO_CLASS[name]
        self._tracker: Any = None

    def on_train_begin(self, module: nn.Module, config: dict[str, Any], folder: Path) -> None:
        place = {"logging_dir": str(folder)} if self._kind.requires_logging_directory else {}
        self._tracker = self._kind(folder.name, **place)
        if hasattr(self._tracker, "start"):
            self._tracker.start()
        plain = {k: v if type(v) in (int, float, str, bool) else str(v) for k, v in config.items()}
        self._tracker.store_init_configuration(plain)

    def on_epoch_end(self, module: nn.Module, row: dict[str, Any]) -> None:
        values = {k: v for k, v in row.items() if k != "epoch" and v is not None}
        self._tracker.log(values, step=row["epoch"])

    def on_train_end(self, module: nn.Module, result: dict[str, Any]) -> None:
        final = {f"final_{k}": v for k, v in result.items() if type(v) in (int, float)}
        self._tracker.log(final, step=result["best_epoch"])

    def close(self) -> None:
        if self._tracker is not None:
            self._tracker.finish()
            self._tracker = None
