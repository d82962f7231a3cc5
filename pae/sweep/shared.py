"""What runs that follow each other in one process have in common, kept between them.

Images are listed and surveyed once, and features of linear probes are computed once: a probe is
little else. Decoded images and the backbone are each run's own, for they are little beside prompts
that are trained on them (docs/sweeps.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pae.train import loop
from pae.train.data import Task
from pae.train.options import Options

if TYPE_CHECKING:
    from accelerate import Accelerator

_MOST = 4  # image sets that are kept


class _Few(dict[str, Any]):
    """The last few that were put in."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        while len(self) > 3 * _MOST:  # splits
            del self[next(iter(self))]


class Shared:
    """Image sets, features, and accelerate's view of the machine, which is one per process, and
    made anew where a run wants another.

    Args:
        workers: threads or processes that decode, where the options do not say.
    """

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers
        self.features: loop.Features = _Few()
        self._tasks: dict[tuple[object, ...], Task] = {}

    def task(self, options: Options) -> Task:
        """The images that the options name, as `loop.load_task` gives them, surveyed.

        Raises:
            ValueError, FetchError: as there.
        """
        mark = tuple(getattr(options, name) for name in loop.TASK_OPTIONS)
        if mark not in self._tasks:
            while len(self._tasks) >= _MOST:
                del self._tasks[next(iter(self._tasks))]
            self._tasks[mark] = loop.load_task(options).surveyed(options.workers)
        return self._tasks[mark]

    def accelerator(self, options: Options) -> Accelerator:
        """As `loop.make_accelerator`, also where a run before had another device or precision."""
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        return loop.make_accelerator(options)
