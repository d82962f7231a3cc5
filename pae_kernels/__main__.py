"""`python -m pae_kernels`: where this package lies, which version of every op runs here, and why.
With `--compile` instead: what the machine code of every Triton tile that ships takes, without a
GPU; of a few with words of their labels, as in `--compile gelu coded --arch 90`.
"""

import argparse
import importlib.metadata
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

HERE = Path(__file__).parent


def main(arguments: list[str] | None = None) -> int:
    """The exit status is 1 where something that the report needs cannot be imported."""
    parser = argparse.ArgumentParser(prog="python -m pae_kernels", description=__doc__)
    parser.add_argument(
        "--compile",
        nargs="*",
        metavar="WORD",
        help="compile the Triton tiles whose label has these words, and print what they take",
    )
    parser.add_argument(
        "--arch", type=int, choices=(80, 90, 100), help="of what to compile for; 80 and 90"
    )
    given = parser.parse_args(arguments)
    _say(_place)
    try:
        import torch

        from . import (  # noqa: F401  (importing registers the ops)
            adaptive,
            ahead_of_time,
            attention,
            backends,
            cpu,
            koopman,
            native,
            pointwise,
            product,
            spectrum,
        )
    except (Exception, SystemExit) as error:
        # not with the words of `backends`, which imports torch
        what = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"pae_kernels cannot be imported: {what}")
        return 1
    if given.compile is not None:
        architectures = (given.arch,) if given.arch else ahead_of_time.ARCHITECTURES
        return _say(partial(ahead_of_time.table, architectures, " ".join(given.compile)))

    def versions() -> Iterator[str]:
        yield f"torch {torch.__version__}, CUDA {'yes' if torch.cuda.is_available() else 'no'}"
        if failure := backends.import_failure("triton"):
            yield failure
        else:
            yield f"triton {getattr(sys.modules['triton'], '__version__', 'of no version')}"

    def forced() -> Iterator[str]:
        try:
            yield f"PAE_BACKEND={backends.forced() or 'auto'}"
        except ValueError as error:
            yield f"{error}; every op refuses, auto would choose:"
            del os.environ["PAE_BACKEND"]

    def library() -> Iterator[str]:
        yield f"compiled CUDA kernels: {native.describe()}"
        yield f"compiled CPU kernels: {cpu.describe()}"

    def table() -> Iterator[str]:
        yield f"{'op':<20}{'device':<8}{'version':<12}not available"
        for op, device, chosen, why in backends.table():
            yield f"{op:<20}{device:<8}{chosen:<12}{why}"

    return max([_say(part) for part in (versions, library, forced, table)])


def _say(lines: Callable[[], Iterator[str]]) -> int:
    """Prints them; what comes in between, in one line, for a diagnostic has no traceback."""
    try:
        for line in lines():
            print(line, flush=True)
    except BrokenPipeError:
        raise
    except (Exception, SystemExit) as error:
        print(" ".join(f"{type(error).__name__}: {error}".split()))
        return 1
    return 0


def _place() -> Iterator[str]:
    yield f"pae_kernels in {HERE}"
    for where in _installed():
        if where != HERE.resolve():
            yield (
                f"it hides the package installed in {where}: it comes first on Python's path "
                "(the current folder, PYTHONPATH)"
            )


def _installed() -> Iterator[Path]:
    """Folders of this package that installs of pae know of; an editable one, of its checkout."""
    found = []
    for distribution in importlib.metadata.distributions(name="pae"):
        record = json.loads(distribution.read_text("direct_url.json") or "{}")
        if record.get("dir_info", {}).get("editable"):
            root = Path(unquote(urlsplit(record["url"]).path))
        else:
            root = Path(str(distribution.locate_file("")))
        found.append((root / HERE.name).resolve())
    yield from (folder for folder in dict.fromkeys(found) if folder.is_dir())


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # paths in whatever letters
    try:
        sys.exit(main())
    except BrokenPipeError:  # `| head` has seen enough; nothing is left to be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
