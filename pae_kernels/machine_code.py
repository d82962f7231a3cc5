"""What a compiled kernel's machine code takes, read from its binary without a GPU.

Triton's wheel carries the two tools that print it: `cuobjdump` for what a launch takes, `nvdisasm`
for the instructions (SASS). Counts are those of the code as it lies there, each instruction once
whatever a loop repeats; `loops` says how long their bodies are.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Multiprocessor:
    """What programs share on one multiprocessor, and the most shared memory one may ask for."""

    shared: int
    most_shared: int
    warps: int = 64
    programs: int = 32
    registers: int = 65536


# architecture -> A100, H100 and H200, B200
MULTIPROCESSORS = {
    80: Multiprocessor(164 * 1024, 163 * 1024),
    90: Multiprocessor(228 * 1024, 227 * 1024),
    100: Multiprocessor(228 * 1024, 227 * 1024),
}
LEAST_SHARED = 99 * 1024  # what a program may ask for on sm_86, 89 and 120, by the tiles of sm_80


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes.

    Attributes:
        warps: of a program.
        registers: a thread.
        spilled: bytes of a thread that do not fit into registers.
        shared: bytes a program.
        programs: that a multiprocessor holds at a time.
        instructions: of a thread's code.
        loops: instructions in the body of each loop, those of inner loops included; outer loops
            and earlier ones first.
        products: instructions of the tensor cores.
        wide: those among them that a group of four warps issues together, sm_90's and sm_100's.
        tf32: those among them that round fp32 to TF32.
        functions: of the special function unit: exponential, logarithm, root, reciprocal.
        barriers: that all warps of a program wait at.
        conversions: accesses of shared memory other than asynchronous copies.
        loads, stores: of global memory, number by width in bits of what a thread moves at once.
        asynchronous: copies from global to shared memory that no register passes.
    """

    warps: int
    registers: int
    spilled: int
    shared: int
    programs: int
    instructions: int
    loops: tuple[int, ...]
    products: int
    wide: int
    tf32: int
    functions: int
    barriers: int
    conversions: int
    loads: dict[int, int]
    stores: dict[int, int]
    asynchronous: int


def read(cubin: bytes, shared: int, warps: int, architecture: int) -> Resources:
    """What the kernel of this binary takes; `shared` bytes as its launch asks for."""
    ((usage, listing),) = printed([cubin], architecture)
    return resources(usage, Code(listing), shared, warps, architecture)


def resources(usage: str, code: Code, shared: int, warps: int, architecture: int) -> Resources:
    """Both tools' words, counted; `usage` as `cuobjdump` says it of one kernel."""
    took = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Resources(
        warps=warps,
        registers=took["REG"],
        spilled=took["STACK"] + took["LOCAL"],
        shared=shared,
        programs=occupancy(architecture, warps, took["REG"], shared),
        instructions=len(code.instructions),
        loops=tuple(len(body) for body in code.bodies),
        products=code.count(_PRODUCTS),
        wide=code.count(_WIDE),
        tf32=code.count(_PRODUCTS, "TF32"),
        functions=code.count({"MUFU"}),
        barriers=code.count({"BAR"}) - code.count({"BAR"}, "ARV"),
        conversions=code.count({"LDS", "STS", "LDSM", "STSM"}),
        loads=code.widths("LDG"),
        stores=code.widths("STG"),
        asynchronous=code.count({"LDGSTS", "UBLKCP", "UTMALDG"}),
    )


def occupancy(architecture: int, warps: int, registers: int, shared: int) -> int:
    """Programs that a multiprocessor holds at a time; 0 when one does not fit."""
    has = MULTIPROCESSORS[architecture]
    if shared > has.most_shared:
        return 0
    of_a_warp = -(-registers * 32 // 256) * 256  # registers are handed out by 256
    held = has.registers // of_a_warp // 4 * 4  # each quarter of a multiprocessor has its own
    return min(
        has.programs,
        has.warps // warps,
        held // warps,
        has.shared // (shared + 1024),  # 1 KB a program is the system's
    )


_WIDE = {"HGMMA", "IGMMA", "UTCHMMA", "UTCIMMA", "UTCQMMA", "UTCOMMA"}
_PRODUCTS = {"HMMA", "IMMA", "DMMA"} | _WIDE
_JUMPS = {"BRA", "CALL"}
_LINE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(@!?U?P\w+ +)?([A-Z][\w.]*)(.*)", re.M)
_JUMP = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(@!?U?P\w+ +)?(BRA|CALL)\b")
_ADDRESS = re.compile(r"\b0x([0-9a-f]+)")
_BYTES = 16  # of an instruction
_SPIN = 8
_WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


class Code:
    """Instructions of one kernel, as `nvdisasm --binary` prints them.

    Attributes:
        instructions: of each the words of its opcode.
        bodies: of each loop its instructions by number; outer loops and earlier ones first.
    """

    def __init__(self, listing: str) -> None:
        self.instructions: list[list[str]] = []  # LDG, E, 128
        jumps: dict[int, int] = {}
        onward: list[bool] = []  # of each, whether the next one may follow it
        for condition, opcode, operands in _LINE.findall(listing):
            words = opcode.split(".")
            if words[0] in _JUMPS and (target := _ADDRESS.search(operands)):
                jumps[len(self.instructions)] = int(target[1], 16) // _BYTES
            onward.append(bool(condition) or words[0] not in ("BRA", "EXIT", "RET"))
            self.instructions.append(words)
        # behind the code it is filled up with jumps to themselves and with nothing
        ends = [i for i, words in enumerate(self.instructions) if words[0] in ("EXIT", "RET")]
        del self.instructions[ends[-1] + 1 :]
        size = len(self.instructions)
        following = [[i + 1] if onward[i] and i + 1 < size else [] for i in range(size)]
        back: dict[int, list[int]] = {}  # first instruction of a loop -> what jumps back to it
        for at, to in jumps.items():
            if at < size and to < size:
                following[at].append(to)
                if to <= at:
                    back.setdefault(to, []).append(at)
        before: list[list[int]] = [[] for _ in range(size)]
        for i, others in enumerate(following):
            for to in others:
                before[to].append(i)
        bodies: list[list[int]] = []
        for first, lasts in sorted(back.items()):
            # code that lies apart also jumps back, but it is no loop: not all ways there lead
            # through its goal
            around = _reached(following, [0], first)
            body = _reached(before, [i for i in lasts if i not in around], first)
            bodies.append(sorted({first, *body}))
        # a few instructions that go round wait for a copy or a product
        self.bodies = tuple(body for body in bodies if len(body) >= _SPIN)

    def count(self, opcodes: set[str], modifier: str | None = None) -> int:
        """Instructions of these opcodes, those with a modifier if one is given."""
        found = (w for w in self.instructions if w[0] in opcodes)
        return sum(modifier is None or modifier in words for words in found)

    def widths(self, opcode: str) -> dict[int, int]:
        """Number of accesses by their width in bits."""
        found = Counter(
            next((_WIDTHS[word] for word in words[1:] if word in _WIDTHS), 32)
            for words in self.instructions
            if words[0] == opcode
        )
        return dict(sorted(found.items()))


def _reached(next_to: list[list[int]], start: list[int], without: int) -> set[int]:
    """Instructions that these lead to, and they themselves, on ways around one of them."""
    found, left = {without}, list(start)
    while left:
        at = left.pop()
        if at not in found:
            found.add(at)
            left += next_to[at]
    return found - {without}


def printed(cubins: Sequence[bytes], architecture: int) -> list[tuple[str, str]]:
    """What both tools say of each binary, of its resources and of its code.

    It is kept where Triton keeps binaries, and what is new is printed by one call: to start the
    disassembler takes longer than it does to print a kernel, or to compile a small one.
    """
    import triton
    from triton.runtime.cache import get_cache_manager

    about = f"{triton.__version__} listing of sm_{architecture} ".encode()
    kept = [get_cache_manager(hashlib.sha256(about + cubin).hexdigest()) for cubin in cubins]
    paths = [manager.get_file("printed.json") for manager in kept]
    new = [i for i, path in enumerate(paths) if path is None]
    shown = listings([code_of(cubins[i]) for i in new], architecture) if new else []
    for i, listing in zip(new, shown, strict=True):
        said = json.dumps([_tool(cubins[i], "cuobjdump", "--dump-resource-usage"), listing])
        paths[i] = kept[i].put(said, "printed.json", binary=False)
    return [tuple(json.loads(Path(str(path)).read_text())) for path in paths]


def listings(codes: list[bytes], architecture: int) -> Iterator[str]:
    """Instructions of each; the goals of its jumps are counted from its beginning."""
    text = _tool(b"".join(codes), "nvdisasm", "--binary", f"SM{architecture}")
    lines = [line for line in text.splitlines() if _LINE.match(line)]
    first = 0
    for code in codes:
        count = len(code) // _BYTES
        here, start = lines[first : first + count], first * _BYTES
        from_0 = lambda found, start=start: f"{found[0][:2]}{int(found[1], 16) - start:x}"
        yield "\n".join(_ADDRESS.sub(from_0, line) if _JUMP.match(line) else line for line in here)
        first += count
    if first != len(lines):
        raise ValueError(f"nvdisasm printed {len(lines)} instructions of {first}")


def code_of(cubin: bytes) -> bytes:
    """Instructions of the only kernel of a binary.

    Raises:
        ValueError: it has none, or several.
    """
    found = kernels(cubin)
    if len(found) != 1:
        raise ValueError(f"a binary must hold one kernel, got {len(found)}")
    return found.popitem()[1]


def kernels(cubin: bytes) -> dict[str, bytes]:
    """Name, as linkers know it, and instructions of each kernel: sections of an ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    heads = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    found = {}
    for name, _, _, _, offset, length in heads:
        at = heads[names][4] + name
        called = cubin[at : cubin.index(b"\0", at)].decode()
        if called.startswith(".text."):
            found[called.removeprefix(".text.")] = cubin[offset : offset + length]
    return found


def _tool(given: bytes, name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile() as file:
        file.write(given)
        file.flush()
        command = [str(path), *arguments, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
