"""The compile gate of csrc/: the machine code that nvcc made of it, against a committed file.

    python -m tests.gate_cuda            # what is worse than tests/cuda_code.json, exit code 1
    python -m tests.gate_cuda --update   # write it down as it is now

`python csrc/native_build.py` compiles the library, without a GPU. Of every kernel the file has what
a launch takes, what the code is made of, and of every loop how long its body is and how many
multiply-adds are in it, from which `bench/predictions.py` reads how often it turns. A kernel's name
is followed by the arguments of its template. Another nvcc makes other code, which has more room; in
no version may a thread spill.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton

from pae.checkpoint import write_atomically
from pae_kernels import machine_code, native
from tests.gate import ROOM, ROOM_ELSEWHERE
from tests.processes import run

FILE = Path(__file__).parent / "cuda_code.json"
ACCEPT = "python -m tests.gate_cuda --update"
ARCHITECTURES = (80, 90, 100)
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
COLUMNS = (
    *("instructions", "registers", "spilled", "shared", "products", "barriers", "loads"),
    *("narrow", "asynchronous"),
)
FUSED = {"FFMA", "HMMA"}  # of a thread, and of a warp

Row = dict[str, list]  # "figures" in the order of COLUMNS, "loops": [instructions, multiply-adds]
Rows = dict[str, dict[str, Row]]  # "sm_90" -> kernel -> row


def of_library(library: Path, architecture: int) -> dict[str, Row]:
    """Every kernel of a library for sm_`architecture`, by name."""
    found: dict[str, tuple[str, bytes]] = {}
    with tempfile.TemporaryDirectory() as folder:
        extract = [TOOL, "-xelf", f"sm_{architecture}", library.resolve()]
        run(extract, cwd=folder)
        for file in Path(folder).iterdir():
            usage = run([TOOL, "--dump-resource-usage", file]).stdout
            takes = dict(re.findall(r"Function (\w+):\s+(REG.*)", usage))
            for symbol, code in machine_code.kernels(file.read_bytes()).items():
                found[name_of(symbol)] = takes[symbol], code
    listings = machine_code.listings([code for _, code in found.values()], architecture)
    return {
        name: _row(usage, machine_code.Code(listing), architecture)
        for (name, (usage, _)), listing in sorted(zip(found.items(), listings, strict=True))
    }


def _row(usage: str, code: machine_code.Code, architecture: int) -> Row:
    static = re.search(r"SHARED:(\d+)", usage)
    assert static is not None
    used = machine_code.resources(usage, code, int(static[1]), 8, architecture)
    moves = [*used.loads.items(), *used.stores.items()]
    kept = {name: getattr(used, name) for name in COLUMNS if name not in ("loads", "narrow")}
    kept |= {"loads": sum(used.loads.values())}
    kept |= {"narrow": sum(count for width, count in moves if width < 32)}
    fused = lambda body: sum(code.instructions[i][0] in FUSED for i in body)
    return {
        "figures": [kept[name] for name in COLUMNS],
        "loops": [[len(body), fused(body)] for body in code.bodies],
    }


_ARGUMENT = re.compile(r"Li(\d+)E|(Lb[01])E|(TwoBf16|OneTf32)|__(nv_bfloat16|half)|(?<=[IE])(f)")
_WORDS = {"nv_bfloat16": "bf16", "half": "fp16", "f": "fp32", "Lb0": "false", "Lb1": "true"}


def name_of(symbol: str) -> str:
    """`koopman_square 16 false` of its symbol: each part of one has its length in front."""
    for found in re.finditer(r"(?=(\d{1,2})([a-z]\w*?_kernel))", symbol):
        if int(found[1]) == len(found[2]):
            rest = symbol[found.end(2) :].partition("Ev")[0]
            given = ["".join(groups) for groups in _ARGUMENT.findall(rest)]
            return " ".join([found[2].removesuffix("_kernel"), *(_WORDS.get(g, g) for g in given)])
    raise ValueError(f"{symbol} is no kernel's symbol: its name must end in _kernel")


def read() -> tuple[str, Rows]:
    """Version line of nvcc, and the committed rows."""
    file = json.loads(FILE.read_text())
    assert file["columns"] == list(COLUMNS), ACCEPT
    return file["nvcc"], file["kernels"]


def write(nvcc: str, rows: Rows) -> None:
    """A line per kernel."""
    lines = {
        where: ",\n".join(f"   {json.dumps(n)}: {json.dumps(row)}" for n, row in here.items())
        for where, here in rows.items()
    }
    text = ",\n".join(f'  "{where}": {{\n{here}\n  }}' for where, here in lines.items())
    head = f' "nvcc": {json.dumps(nvcc)},\n "columns": {json.dumps(COLUMNS)},\n'
    write_atomically(FILE, lambda p: p.write_text(f'{{\n{head} "kernels": {{\n{text}\n }}\n}}\n'))


def complaints(now: Rows, nvcc: str) -> Iterator[str]:
    """What is wrong, each in one line."""
    of_version, committed = read()
    room = ROOM if nvcc == of_version else ROOM_ELSEWHERE
    for where, kernels in now.items():
        for name in sorted({*kernels} ^ {*committed[where]}):
            word = "has no budget" if name in kernels else "is no longer compiled"
            yield f"csrc: {name}, {where} {word}. If it must be: {ACCEPT}"
        for name in sorted({*kernels} & {*committed[where]}):
            figures = zip(
                COLUMNS, kernels[name]["figures"], committed[where][name]["figures"], strict=True
            )
            for column, value, was in figures:
                bound = was if column in ("spilled", "narrow") else int(was * (1 + room))
                few = column in ("products", "asynchronous") and value < was / 2
                if few or value > bound:
                    yield f"csrc: {name}, {where}: {column} {value}, was {was}: {ACCEPT}"


def main(arguments: list[str] | None = None) -> int:
    about = str(__doc__).partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m tests.gate_cuda", description=about)
    parser.add_argument("--update", action="store_true", help="accept the figures as they are")
    given = parser.parse_args(arguments)
    record = native.build_record()
    if "reason" in record:
        print(f"there is no library to read: {record['reason']}")
        return 2
    now = {f"sm_{a}": of_library(native.PATH, a) for a in ARCHITECTURES}
    if given.update:
        write(record["nvcc"], now)
        return 0
    said = list(complaints(now, record["nvcc"]))
    print("\n".join(said) or f"{sum(map(len, now.values()))} kernels within their budgets")
    return int(bool(said))


if __name__ == "__main__":
    raise SystemExit(main())
