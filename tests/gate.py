"""The compile gate: the machine code of everything that is launched, against a committed file.

    python -m tests.gate                   what is worse than tests/budgets.json; exit code 1 if any
    python -m tests.gate gelu --arch 90    figures of the launches whose names have these words
    python -m tests.gate --update          write them down as they are now, for this Triton
    python -m tests.gate --tests           what tests launch on a GPU instead
    python -m tests.gate --room koopman    packages of kernels, with or without --tests
    python -m tests.gate --steps           without what benchmarks alone launch

No GPU is needed: `launches.py` says what a step or a benchmark launches, with its true types,
alignments and constants, Triton compiles it, and `pae_kernels/machine_code.py` reads the binary.

Other versions of Triton make other code, so a budget belongs to a line of them (3.8). There code
may become worse by `ROOM`. A line without budgets is measured by the worst known one, with more
room: it is red for another kind of code (spills, a polynomial formed twice, loads of single
entries, products that leave the tensor cores), not for other code of the same kind. A name says
what is computed; tiles, warps and stages are ours to choose, so they are no part of it.

Tests launch the same kernels with every switch, odd size and odd layout, so that a budget for each
would be most of the file and say little: there a kernel has one for each kind of its arrays, the
worst figure of all its launches in each column. Nothing may leave the tensor cores, spill more or
read by single entries that does so nowhere today; of one launch among many it says less.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import triton

from pae.checkpoint import write_atomically
from pae_kernels import machine_code
from pae_kernels.machine_code import Resources
from tests import launches
from tests.stand_in import Launch

FILE = Path(__file__).parent / "budgets.json"
ACCEPT = "python -m tests.gate --update"
ARCHITECTURES = (80, 90, 100)
ROOMS = ("adaptive", "attention", "koopman", "pointwise", "product", "spectrum")
LINE = ".".join(triton.__version__.split(".")[:2])

ROOM, ROOM_ELSEWHERE = 0.05, 0.3
SPILLED_ELSEWHERE = 64  # bytes a thread that another Triton may spill

# what a program makes, for instructions per entry; of most kernels with loops nothing is said
ENTRIES: dict[str, Callable[[dict], int]] = {
    "activation_fwd": lambda c: c["BLOCK"],
    "activation_bwd": lambda c: c["BLOCK"],
    "layer_norm_fwd": lambda c: c["WIDTH"] * c["ROWS"],
    "layer_norm_bwd": lambda c: c["WIDTH"] * c["ROWS"],
    "gated_fwd": lambda c: c["BLOCK"],
    "gated_bwd": lambda c: c["BLOCK"],
    "rotate": lambda c: 4 * c["HEADS"] * c["HALF"],
    "row_stats": lambda c: c["WIDTH"] * c["ROWS"],
    # of a tile, with a turn of its products
    "product_activation_fwd": lambda c: c["BLOCK_M"] * c["BLOCK_N"],
    "product_activation_bwd": lambda c: c["BLOCK_M"] * c["BLOCK_N"],
}
_TILES = ("BLOCK", "ROWS", "PER_PROGRAM", "PARTS", "SLICE", "TOGETHER")


@dataclass(frozen=True)
class Figures:
    """What is guarded of a launch, in the order of the file; worse is more, or less in `FEWER`."""

    spilled: int
    programs: int
    instructions: int
    loop: int  # the longest innermost body
    products: int
    wide: int
    tf32: int
    functions: int
    barriers: int
    conversions: int
    loads: int
    narrow: int  # loads and stores of fewer than 32 bits
    asynchronous: int
    registers: int  # these three are for information
    shared: int
    per_entry: float

    @classmethod
    def of(cls, used: Resources, launch: Launch) -> Figures:
        entries = ENTRIES.get(name_of(launch), lambda c: 0)(dict(launch.constants))
        each = used.instructions * 32 * used.warps / entries if entries else 0.0
        moves = [*used.loads.items(), *used.stores.items()]
        return cls(
            spilled=used.spilled,
            programs=used.programs,
            instructions=used.instructions,
            loop=used.loops[-1] if used.loops else 0,
            products=used.products,
            wide=used.wide,
            tf32=used.tf32,
            functions=used.functions,
            barriers=used.barriers,
            conversions=used.conversions,
            loads=sum(used.loads.values()),
            narrow=sum(count for width, count in moves if width < 32),
            asynchronous=used.asynchronous,
            registers=used.registers,
            shared=used.shared,
            per_entry=round(each, 1),
        )


FEWER = ("programs", "wide", "asynchronous")
COLUMNS = tuple(Figures.__dataclass_fields__)
GUARDED = COLUMNS[: COLUMNS.index("registers")]


def name_of(launch: Launch) -> str:
    return launch.kernel.__name__.removesuffix("_kernel").removeprefix("prompt_")


_ENTRIES_OF = re.compile(r"(?:\*|tensordesc<)(\w+)")  # an array, by its address or described


def described(launch: Launch) -> str:
    """Kernel, dtypes that it reads and writes, switches; and what is not aligned."""
    kinds = [found[1] for _, kind in launch.types if (found := _ENTRIES_OF.match(kind))]
    runs = [k for i, k in enumerate(kinds) if i == 0 or kinds[i - 1] != k]
    switches = [f"{n}={v}" for n, v in launch.constants if not n.startswith(_TILES)]
    odd = [n for n, kind in launch.types if kind.startswith("*") and n not in launch.aligned]
    rest = [f"unaligned {' '.join(odd)}"] if odd else []
    return " ".join([name_of(launch), ",".join(runs), *switches, *rest])


def tile_of(launch: Launch) -> str:
    sizes = [f"{n}={v}" for n, v in launch.constants if n.startswith(_TILES)]
    return " ".join([*sizes, f"warps={launch.warps} stages={launch.stages}"])


def alignment_of(launch: Launch) -> str:
    return f"multiples of 16: {' '.join(launch.aligned)}"


def named(found: Iterable[Launch]) -> dict[str, Launch]:
    """By their names; the tile, then what is aligned, tells those apart that are the same else."""
    names = {launch: described(launch) for launch in found}
    for more in (tile_of, alignment_of):
        times = Counter(names.values())
        names = {la: n if times[n] == 1 else f"{n} {more(la)}" for la, n in names.items()}
    return {name: launch for launch, name in sorted(names.items(), key=itemgetter(1))}


# ---- the file


Budgets = dict[str, dict[str, Figures]]  # name -> "3.8 sm_90" -> figures


OF_TESTS = "tests: "  # in front of a kernel and the kinds of its arrays


def worst(found: Iterable[tuple[str, Figures]]) -> dict[str, Figures]:
    """By kernel and kinds of its arrays, what is worst in each column."""
    by_name: dict[str, list[Figures]] = {}
    for name, figures in found:
        by_name.setdefault(OF_TESTS + " ".join(name.split()[:2]), []).append(figures)
    return {
        name: Figures(
            **{c: (min if c in FEWER else max)(getattr(f, c) for f in same) for c in COLUMNS}
        )
        for name, same in by_name.items()
    }


def read() -> Budgets:
    """The committed budgets."""
    file = json.loads(FILE.read_text()) if FILE.exists() else {"columns": [], "launches": {}}
    return {
        name: {where: Figures(**dict(zip(file["columns"], row))) for where, row in rows.items()}
        for name, rows in file["launches"].items()
    }


def budget(budgets: Budgets, launch: Launch) -> dict[str, Figures]:
    """Of one launch, which has more in its name where another differs in nothing else."""
    name, found = described(launch), {}
    for more in ("", f" {tile_of(launch)}", f" {alignment_of(launch)}"):
        name += more
        found |= budgets.get(name, {})
    return found


def write(budgets: Budgets) -> None:
    """One line per launch and place."""
    blocks = [
        f"  {json.dumps(name)}: {{\n"
        + ",\n".join(
            f'   "{where}": {json.dumps(list(vars(figures).values()))}'
            for where, figures in sorted(rows.items())
        )
        + "\n  }"
        for name, rows in sorted(budgets.items())
        if rows
    ]
    text = f'{{\n "columns": {json.dumps(COLUMNS)},\n "launches": {{\n' + ",\n".join(blocks)
    write_atomically(FILE, lambda path: path.write_text(text + "\n }\n}\n"))


_KINDS = ("tf32", "narrow")  # a single one more is another kind of code


def complaints(
    name: str, now: Figures, committed: dict[str, Figures], architecture: int, line: str = LINE
) -> Iterator[str]:
    """What is wrong with one launch, each in one line.

    Args:
        committed: its budgets, by place.
        line: the version line of Triton that compiled it.
    """
    at = f"{name}, sm_{architecture}"
    known = committed.get(f"{line} sm_{architecture}")
    worst = [f for where, f in committed.items() if where.endswith(f" sm_{architecture}")]
    if not worst:
        yield f"{at} has no budget. Write one down: {ACCEPT}"
        return
    for column in GUARDED:
        value = getattr(now, column)
        budget = [getattr(f, column) for f in ([known] if known else worst)]
        bound = _bound(column, budget, known is not None)
        fewer = column in FEWER
        if value < bound if fewer else value > bound:
            was, word = (min(budget), "least") if fewer else (max(budget), "most")
            yield f"{at}: {column} {value}, was {was}, at {word} {bound}. If it must be: {ACCEPT}"


def _bound(column: str, budget: list[int], known: bool) -> int:
    """The worst that is allowed, given the budgets that count."""
    if column in FEWER:
        least = min(budget)
        if known or least == 0:
            return least
        return max(1, int(least * (1 - ROOM_ELSEWHERE))) if column == "programs" else 1
    most = max(budget)
    if known or column in _KINDS:
        return most if column in _KINDS else int(most * (1 + ROOM))
    more = SPILLED_ELSEWHERE if column == "spilled" else 2
    return int(most * (1 + ROOM_ELSEWHERE)) + more


def faults(name: str, now: Figures, architecture: int) -> Iterator[str]:
    """What is wrong with a launch whatever its budget, each in one line."""
    at = f"{name}, sm_{architecture}"
    if not now.programs:
        yield f"{at}: {now.registers} registers, {now.shared} bytes shared: no program fits"
    if architecture == 80 and now.shared > machine_code.LEAST_SHARED:
        yield f"{at}: {now.shared} bytes shared, which sm_86, 89 and 120 do not have"
    if now.tf32 and "PRECISION=tf32x3" not in name:
        yield f"{at}: {now.tf32} products round fp32 to TF32"
    if now.spilled > SPILLED_ELSEWHERE and "16" in name.split()[1]:
        yield f"{at}: a thread spills {now.spilled} bytes"


def of_tests(
    found: dict[str, Figures], budgets: Budgets, architecture: int, line: str = LINE
) -> Iterator[str]:
    """What is wrong with the worst of what tests launch of one room, where that is guarded: where
    any of it has a budget on this architecture.
    """
    place = f" sm_{architecture}"
    if any(where.endswith(place) for name in found for where in budgets.get(name, {})):
        for name, figures in found.items():
            yield from complaints(name, figures, budgets.get(name, {}), architecture, line)
    elif found:
        print(f"without budgets on{place}, by rules alone: {', '.join(found)}")


# ---- the command


def guarded(architecture: int, steps: bool = False) -> dict[str, Launch]:
    """Name -> launch, of all that have a budget: on sm_90 what steps and benchmarks launch, or
    `steps` alone, on the others attention, pointwise passes and products with epilogues of a step
    in bf16.
    """
    found = launches.of_steps(architecture)
    if architecture == 90:
        # names of all, since a tile is in a name where another launch differs in nothing else
        everything = named({**found, **launches.of_benchmarks(architecture)})
        return {n: launch for n, launch in everything.items() if launch in found or not steps}
    return {name: launch for name, launch in named(found).items() if is_main(name, launch)}


def is_main(name: str, launch: Launch) -> bool:
    """Whether it is guarded on every architecture."""
    return room_of(launch) in ("attention", "pointwise", "product") and "bf16" in name


def room_of(launch: Launch) -> str:
    """Package of the kernel: attention, pointwise, ..."""
    return str(launch.kernel.__module__).split(".")[1]


def compiled(
    chosen: dict[str, Launch], architecture: int, jobs: int
) -> Iterator[tuple[str, Figures]]:
    """Names and figures, in order."""
    # kernels do not travel between processes, but they are there after a fork
    _work[:] = chosen.values()
    parts = [(at, architecture) for at in range(0, len(_work), TOGETHER)]
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from zip(chosen, chain.from_iterable(pool.imap(_compiled, parts)))


TOGETHER = 16  # binaries that one call of the disassembler prints
_work: list[Launch] = []


def _compiled(part: tuple[int, int]) -> list[Figures]:
    at, architecture = part
    here = _work[at : at + TOGETHER]
    binaries = [launch.binary(architecture) for launch in here]
    machine_code.printed([cubin for cubin, *_ in binaries], architecture)
    return [
        Figures.of(machine_code.read(*binary), launch)
        for binary, launch in zip(binaries, here, strict=True)
    ]


def main(arguments: list[str] | None = None) -> int:
    about = str(__doc__).partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m tests.gate", description=about)
    parser.add_argument("words", nargs="*", help="of the names of the launches that are wanted")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--update", action="store_true", help="accept the figures as they are")
    parser.add_argument("--tests", action="store_true", help="launches of tests instead")
    parser.add_argument("--steps", action="store_true", help="without benchmarks")
    parser.add_argument("--room", nargs="+", choices=ROOMS, help="of these packages of kernels")
    given = parser.parse_args(arguments)
    if given.tests and given.update and given.words:
        parser.error("--tests --update writes the worst of whole rooms: name them by --room")
    budgets, said, count = read(), [], 0
    print(f"Triton {triton.__version__}", flush=True)
    for architecture in given.arch:
        where = f"{LINE} sm_{architecture}"
        if given.tests:
            found = named(launches.of_tests(architecture))
        else:
            found = guarded(architecture, given.steps)
        chosen = {n: launch for n, launch in found.items() if all(w in n for w in given.words)}
        known: dict[str, Any] = {} if given.tests else dict(found)
        for room in given.room or sorted({*map(room_of, chosen.values())}):
            here = {n: launch for n, launch in chosen.items() if room_of(launch) == room}
            count += len(here)
            print(f"sm_{architecture}, {room}: {len(here)} launches", flush=True)
            seen: list[tuple[str, Figures]] = []
            for name, figures in compiled(here, architecture, given.jobs):
                seen.append((name, figures))
                if given.words:
                    print(f"{name}, sm_{architecture}, {tile_of(here[name])}")
                    print("   ", ", ".join(f"{c} {v}" for c, v in vars(figures).items() if v))
                said += faults(name, figures, architecture)
                if not given.tests:
                    said += complaints(name, figures, budgets.get(name, {}), architecture)
            guards = dict(seen) if not given.tests else {} if given.words else worst(seen)
            if given.update:  # whoever stops later keeps what there is, and others may write
                budgets = read()
                for name, figures in guards.items():
                    budgets.setdefault(name, {})[where] = figures
                write(budgets)
            if given.tests:
                known |= guards
                said += of_tests(guards, budgets, architecture)
        if given.steps or (given.tests and (given.words or given.room)):
            continue
        old = [n for n in budgets if n.startswith(OF_TESTS) == given.tests and where in budgets[n]]
        for name in [n for n in old if n not in known]:
            said.append(f"{name}, sm_{architecture} is no longer launched. Strike it out: {ACCEPT}")
            if given.update:
                del budgets[name][where]
        if given.update:
            write(budgets)
    print("\n".join(said) or f"{count} launches within their budgets")
    return int(bool(said) and not given.update)


if __name__ == "__main__":
    raise SystemExit(main())
