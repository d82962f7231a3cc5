"""What every GPU kernel should take, before it is measured: a model, and the two figures beside.

    python -m bench.predictions              # writes bench/gpu_predictions.json again
    python -m bench.predictions RESULTS.json # predicted and measured of one run, side by side

A card is what was seen of it: GB/s of a large copy, TFLOP/s of a large bf16 product; its processors
and their clock. A pass is what it moves (each input read once, each output written once), what it
multiplies (2 per multiply-add, tiles padded), and what it issues: instructions of a warp, those
that `tests/budgets.json` holds of the machine code for sm_90 (the file here is made again with it).
Each alone takes

    bytes / copy     operations / products     instructions / (4 a cycle and multiprocessor)

where the last is that of the multiprocessor with most programs, and a warp of its own issues one a
cycle at most. The floor is the larger of the first two without padding: no exact version is faster
on this card. Expected is the largest of the three, and half of the others, as far as they hide
behind it (the half is a guess, to be judged by measurements), and 3 us a launch in a graph. Of
`csrc/` it is the code that nvcc made (`tests/cuda_code.json`): how often a loop turns follows from
the stages that the source cuts a sum into, and from the multiply-adds in its body; a block that
takes one of several roles is given an equal share of the code around the loops; and loops of a few
turns that bring operands, or add up parts, count once but where their turns are named. A step
without a graph lasts at least as long as its host needs (`host.py`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pae.checkpoint import write_atomically
from pae_kernels import ahead_of_time
from pae_kernels.adaptive import triton as of_adaptive
from pae_kernels.attention import tiles
from pae_kernels.koopman import tiles as of_koopman
from pae_kernels.launching import power_of_2
from pae_kernels.spectrum import triton as of_spectrum

from . import cost, roofline, shapes, table
from .host import Host, steps
from .results import Run, measured

FILE = Path(__file__).parent / "gpu_predictions.json"
BUDGETS = Path(__file__).parents[1] / "tests" / "budgets.json"  # written by tests/gate.py
CUDA = BUDGETS.with_name("cuda_code.json")  # written by tests/gate_cuda.py
LAUNCH = 3e-6  # seconds between two kernels of a graph, first wave and last one included
BATCH, ROWS, PROMPTS, WIDTH, HEADS = 128, 197, 50, 768, 12
FP32_PER_PRODUCT = 1 / 15  # of plain fp32 multiply-adds, in multiples of the bf16 rate


@dataclass(frozen=True)
class Card:
    """What a GPU was seen to do."""

    copy_gbps: float
    bf16_tflops: float
    multiprocessors: int
    clock_ghz: float

    def warps_issued(self) -> float:
        """Instructions a second: four schedulers, one each a cycle."""
        return 4 * self.multiprocessors * self.clock_ghz * 1e9


CARDS = {"H100": Card(3000, 798, 132, 1.755), "H200": Card(4300, 788, 132, 1.755)}


@dataclass(frozen=True)
class Code:
    """Of one kernel's machine code: static instructions, those of its longest innermost loop, for a
    pointwise kernel a thread's for one entry; registers, and programs that a multiprocessor holds.
    """

    instructions: int
    loop: int
    per_entry: float
    registers: int
    programs: int

    @classmethod
    def of(cls, kernel: str, *words: str, tile: str = "") -> Code:
        """By the newest Triton of the budgets.

        Args:
            words: of its name there. tile: a word more, where it is launched with several tiles.

        Raises:
            LookupError: none has these words, or several.
        """
        file = json.loads(BUDGETS.read_text())
        # one launch, not the worst of what tests launch
        single = [
            name
            for name, places in file["launches"].items()
            if not name.startswith("tests: ") and any(p.endswith(" sm_90") for p in places)
        ]
        fits = [n for n in single if {kernel, *words} <= {*n.split()}]
        if len(fits) > 1:
            fits = [n for n in fits if tile in n.split()]
        if len(fits) != 1:
            raise LookupError(
                f"{BUDGETS.name} must hold one launch of {kernel} {' '.join(words)}, got "
                f"{len(fits)}: name it in bench/predictions.py as python -m tests.gate does"
            )
        places = [p for p in file["launches"][fits[0]] if p.endswith(" sm_90")]
        newest = max(places, key=lambda p: [int(part) for part in p.split()[0].split(".")])
        row = dict(zip(file["columns"], file["launches"][fits[0]][newest], strict=True))
        return cls(**{name: row[name] for name in cls.__dataclass_fields__})

    @classmethod
    def of_cuda(cls, kernel: str, fused: int = 0, roles: int = 1, role: int = 0) -> Code:
        """Of a kernel of csrc/ on sm_90, with the longest loop that has so many multiply-adds.

        Args:
            roles: that a block may have. role: which of them, by their loops, longest first.

        Raises:
            LookupError: there is no such kernel, or it has no such loop.
        """
        file = json.loads(CUDA.read_text())
        row = file["kernels"]["sm_90"].get(kernel, {"loops": []})
        loops = sorted((size for size, count in row["loops"] if count >= fused), reverse=True)
        if len(loops) <= role:
            raise LookupError(
                f"{CUDA.name} must hold {kernel} with {role + 1} loops of {fused} multiply-adds or "
                f"more, got {len(loops)}: python -m tests.gate_cuda --update, and look why"
            )
        figures = dict(zip(file["columns"], row["figures"], strict=True))
        others = sum(loops[:roles]) - loops[role] if roles > 1 else 0
        mine = loops[role] + (figures["instructions"] - others - loops[role]) // roles
        return cls(mine, loops[role], 0.0, figures["registers"], 0)

    def issued(self, warps: int, programs: int, turns: int) -> float:
        """Millions of instructions, when the loop turns so often in each program."""
        return warps * programs * (self.instructions + (turns - 1) * self.loop) / 1e6


@dataclass(frozen=True)
class Grid:
    """Programs of one launch, of so many warps, whose longest loop turns so often in each; `more`
    instructions are those of other loops from their second turn on.
    """

    code: Code
    warps: int
    programs: int
    turns: int = 1
    more: int = 0

    def seconds(self, card: Card) -> float:
        """Of the multiprocessor that has most of them, when each waits for its turn alone."""
        most = -(-self.programs // card.multiprocessors)
        path = self.code.instructions + (self.turns - 1) * self.code.loop + self.more
        return max(1.0, most * self.warps / 4) * path / (card.clock_ghz * 1e9)


@dataclass(frozen=True)
class Pass:
    """What one call does.

    Attributes:
        row: group of the benchmark that measures it, and its row; "" where none does.
        kernels: the functions it launches.
        mb: bytes that must move. gflop: products that are needed. padded_gflop: that are done.
        instructions: of a warp, in millions; of what is given as `grids` it is known from them.
        launches: kernels that follow each other.
        slowdown: of its products, in multiples of bf16's.
        code: of the kernel that takes longest, where it is known.
        host_us: what the host needs for it at least, where it is no graph.
    """

    name: str
    kernels: str
    mb: float
    gflop: float = 0.0
    padded_gflop: float = 0.0
    instructions: float = 0.0
    launches: int = 1
    row: tuple[str, str] = ("", "")
    slowdown: float = 1.0
    code: Code | None = None
    grids: tuple[Grid, ...] = ()
    host_us: float = 0.0

    def floor_us(self, card: Card) -> float:
        """By bytes and by products, whichever takes longer."""
        return max(self._bytes(card), self._products(card, self.gflop)) * 1e6

    def expected_us(self, card: Card) -> float:
        """By the model at the head of this module."""
        products = self._products(card, self.padded_gflop or self.gflop)
        issued = self.instructions * 1e6 / card.warps_issued()
        issued += sum(grid.seconds(card) for grid in self.grids)
        terms = self._bytes(card), products, issued
        longest = max(terms)
        device = longest + (sum(terms) - longest) / 2 + LAUNCH * self.launches
        return max(device * 1e6, self.host_us)

    def _bytes(self, card: Card) -> float:
        return self.mb * 1e6 / (card.copy_gbps * 1e9)

    def _products(self, card: Card, gflop: float) -> float:
        return gflop * self.slowdown / (card.bf16_tflops * 1e3)


def _padded(rows: int, tile: int) -> int:
    return -(-rows // tile) * tile


def _of_attention(
    kernel: str,
    batch: int,
    tokens: int,
    tile: tiles.Tile,
    rows: int,
    *words: str,
    heads: int = HEADS,
) -> tuple[Code, float]:
    """Code of a kernel in bf16, and what it issues when each program goes over `rows` others."""
    named: tuple[str, ...] = ("PLACED=0",)
    if words:
        named = words
    elif kernel == "attention_fwd":
        named = *named, "bf16,fp32", "FOLDED=True"
    else:
        named = *named, "bf16,fp32,bf16,fp32", "NEED_QKV=True"
    named = *named, "GROUPING=0", f"HEADS={heads}", f"WIDTH={WIDTH // HEADS}"
    code = Code.of(kernel, *named, tile=f"BLOCK_M={tile.block_m}")
    mine, step = tile.block_m, tile.block_n
    if kernel == "attention_bwd_dkv":
        mine, step = step, mine
    programs = batch * heads * -(-tokens // mine)
    return code, code.issued(tile.warps, programs, -(-rows // step))


def attention() -> Iterator[Pass]:
    """Forward in tiles of query rows, backward all rows at once: five products. The class row alone
    reads q of one row.
    """
    keys = ROWS + PROMPTS
    qkv = torch.empty(BATCH, ROWS, 3, HEADS, WIDTH // HEADS, dtype=torch.bfloat16, device="meta")
    few = {"padded_gflop": 4 * BATCH * 16 * _padded(keys, 64) * WIDTH / 1e9}
    rows_mb = BATCH * ROWS * WIDTH * 2 / 1e6
    for kind, done, short, kernel in (
        ("forward", 2, "fwd", "prompt_attention_fwd_kernel"),
        ("backward", 5, "bwd", "prompt_attention_bwd_kernel"),
    ):
        chosen = tiles.forward if kind == "forward" else tiles.backward_whole
        tile, tile_of_one = chosen(qkv, ROWS), chosen(qkv, 1)
        assert tile is not None and tile_of_one is not None
        sizes = BATCH, ROWS, PROMPTS, WIDTH
        code, issued = _of_attention(f"attention_{short}", BATCH, ROWS, tile, keys)
        square = BATCH * _padded(ROWS, tile.block_m) * _padded(keys, tile.block_n) * WIDTH
        yield Pass(
            f"attention {kind}", kernel,
            mb=roofline.attention_bytes(kind, *sizes, 2) / 1e6,
            gflop=roofline.attention_flops(kind, *sizes) / 1e9,
            padded_gflop=2 * done * square / 1e9,
            instructions=issued,
            code=code,
            row=(f"attention/{kind}/H{HEADS}d64/N{ROWS}/P{PROMPTS}/bf16/B{BATCH}", "pae"),
        )  # fmt: skip
        code, issued = _of_attention(f"attention_{short}", BATCH, 1, tile_of_one, keys)
        moved = rows_mb * (2 if kind == "forward" else 4)
        name = f"attention {kind}, class row"
        yield Pass(name, kernel, moved, instructions=issued, code=code, **few)
        # a table of (H, N, N) in fp32, which stays in L2, is read by every image from there
        code, issued = _of_attention(f"attention_{short}", BATCH, ROWS, tile, keys, "PLACED=1")
        yield Pass(
            f"attention {kind}, with a bias", kernel,
            mb=roofline.attention_bytes(kind, *sizes, 2) / 1e6 + HEADS * ROWS * ROWS * 4 / 1e6,
            gflop=roofline.attention_flops(kind, *sizes) / 1e9,
            padded_gflop=2 * done * square / 1e9,
            instructions=issued,
            code=code,
        )  # fmt: skip
    for batch, tokens, heads in ((100, 77, 8), (100, 24, 8)):  # CLIP's text tower, causal
        qkv = torch.empty(batch, tokens, 3, heads, 64, dtype=torch.bfloat16, device="meta")
        for kind, done, short, chosen in (
            ("forward", 2, "fwd", tiles.forward),
            ("backward", 5, "bwd", tiles.backward_whole),
        ):
            tile = chosen(qkv, tokens)
            assert tile is not None
            sizes = batch, tokens, 0, 64 * heads
            given = f"attention_{short}", batch, tokens, tile, tokens, "PLACED=4"
            code, issued = _of_attention(*given, heads=heads)
            square = batch * _padded(tokens, tile.block_m) * _padded(tokens, tile.block_n)
            name = f"H{heads}d64/causal/N{tokens}/P0/bf16/B{batch}"
            yield Pass(
                f"attention {kind}, causal, {tokens} rows", f"prompt_attention_{short}_kernel",
                mb=roofline.attention_bytes(kind, *sizes, 2) / 1e6,
                gflop=roofline.attention_flops(kind, *sizes, causal=True) / 1e9,
                padded_gflop=2 * done * square * 64 * heads / 1e9,
                instructions=issued,
                code=code,
                row=(f"attention/{kind}/{name}", "pae"),
            )  # fmt: skip
    batch, tokens = 32, 577  # too long for one pass: seven products, and 13 S of bytes
    keys = tokens + PROMPTS
    qkv = torch.empty(batch, tokens, 3, HEADS, 64, dtype=torch.bfloat16, device="meta")
    tile = tiles.backward_split(qkv, tokens)
    square = batch * _padded(tokens, tile.block_m) * _padded(keys, tile.block_n) * WIDTH
    of_queries = _of_attention("attention_bwd_dq", batch, tokens, tile, keys)
    of_keys = _of_attention("attention_bwd_dkv", batch, keys, tile, tokens)
    yield Pass(
        "attention backward in two passes",
        "prompt_attention_bwd_dq_kernel, prompt_attention_bwd_dkv_kernel",
        mb=13 * batch * tokens * WIDTH * 2 / 1e6,
        gflop=roofline.attention_flops("backward", batch, tokens, PROMPTS, WIDTH) / 1e9,
        padded_gflop=2 * 7 * square / 1e9,
        instructions=of_queries[1] + of_keys[1],
        code=of_keys[0],
        launches=2,
        row=(f"attention/backward/H{HEADS}d64/N{tokens}/P{PROMPTS}/bf16/B{batch}", "pae"),
    )


def pointwise() -> Iterator[Pass]:
    """Bytes an entry: of the fp32 stream 4, of rows for products 2, of a code 1."""
    wide = f"WIDTH={WIDTH}"
    for name, times, moved, kernel, *words in (
        ("norm/forward", 1, 12, "layer_norm_fwd", "fp32,bf16,fp32,bf16,fp32", wide),
        ("norm/backward", 1, 14, "layer_norm_bwd", "bf16,fp32,bf16", wide),
        ("gelu/forward", 4, 4, "activation_fwd", "bf16", "KIND=gelu"),
        ("gelu/backward", 4, 6, "activation_bwd", "bf16", "KIND=gelu"),
        ("coded gelu/forward", 4, 5, "activation_fwd", "bf16,u8", "KIND=gelu"),
        ("coded gelu/backward", 4, 5, "activation_bwd", "bf16,u8,bf16", "KIND=gelu"),
    ):
        entries = BATCH * ROWS * WIDTH * times / 1e6
        code = Code.of(kernel, *words)
        yield Pass(
            name, f"{kernel}_kernel{', with a code' if 'coded' in name else ''}", entries * moved,
            instructions=entries * code.per_entry / 32, code=code,
            row=(f"{name}/{BATCH * ROWS}x{WIDTH * times}/bf16", "pae"),
        )  # fmt: skip


def of_other_blocks() -> Iterator[Pass]:
    """Gates of as many units as an MLP has; turned queries and keys. Bytes an entry of what comes
    out: of a gate 6 and 10, turned in place 4.
    """
    units, turned = BATCH * ROWS * 4 * WIDTH / 1e6, BATCH * (ROWS - 1) * 2 * WIDTH / 1e6
    for name, entries, moved, kernel, *words in (
        ("gate forward", units, 6, "gated_fwd", "bf16", "KIND=silu"),
        ("gate backward", units, 10, "gated_bwd", "bf16", "KIND=silu"),
        ("rotation", turned, 4, "rotate", "bf16,fp32", "BACK=False", f"HEADS={HEADS}"),
    ):
        code, mb = Code.of(kernel, *words), entries * moved
        issued = entries * code.per_entry / 32
        yield Pass(name, f"{kernel}_kernel", mb, instructions=issued, code=code)


def products() -> Iterator[Pass]:
    """fc1 and fc2's backward with the activation in their epilogues: products at 0.75 of the large
    one's rate, and per entry what the code of a tile is, its products' loop but once.
    """
    rows, weight = BATCH * ROWS, 4 * WIDTH * WIDTH * 2 / 1e6
    narrow, entries = rows * WIDTH * 2 / 1e6, rows * WIDTH * 4 / 1e6
    gflop = 2 * rows * WIDTH * 4 * WIDTH / 1e9
    # bytes an entry: made, kept or read again
    for name, kernel, moved, kinds, switch in (
        ("forward", "fwd", 4, "bf16", "KEEP=0"),
        ("coded forward", "fwd", 3, "bf16,u8,bf16", "KEEP=1"),
        ("lean forward", "fwd", 2, "bf16", "KEEP=2"),
        ("backward", "bwd", 4, "bf16", "CODED=False"),
        ("coded backward", "bwd", 3, "bf16,u8,bf16", "CODED=True"),
    ):
        code = Code.of(f"product_activation_{kernel}", kinds, "KIND=gelu", switch, "TMA=True")
        yield Pass(
            f"product, {name}", f"product_activation_{kernel}_kernel",
            narrow + weight + entries * moved, gflop, gflop / 0.75,
            entries * code.per_entry / 32, code=code,
            row=(f"product/{name}/{rows}x{WIDTH}x{4 * WIDTH}/bf16", "pae, one kernel"),
        )  # fmt: skip


def koopman() -> Iterator[Pass]:
    """Latency decides: launches that follow each other, fp32 products without tensor cores. A
    squaring after the projector has settled is a launch, and issues next to nothing.
    """
    for k in (256, 1024):
        gflop = roofline.koopman_flops(12, PROMPTS, WIDTH, k) / 1e9
        mb = 4 * (2 * 12 * PROMPTS * WIDTH + 2 * k * WIDTH + 4 * k * k) / 1e6
        grids = (*_koopman_forward(k, 24 - SETTLED[k]), *_koopman_backward(k))
        compiled = tuple(_koopman_cuda(k, 24 - SETTLED[k]))
        for kernels, row, launches, counted in (
            ("koopman_*_kernel", "pae, Triton graph", 38, grids),
            ("csrc/koopman_*.cu", "pae, CUDA graph", 30, compiled),
        ):
            yield Pass(
                f"regulariser, k = {k}, {row}", kernels, mb, gflop,
                launches=launches, slowdown=1 / FP32_PER_PRODUCT,
                row=(f"kld/global/k{k}/P{PROMPTS}", row), grids=counted,
            )  # fmt: skip


_DEEP = 32  # of a turn
# squarings that find the projector settled, of the L that bench_kld draws, and return
SETTLED = {256: 13, 1024: 14}


def _square_tiles(
    kernel: str, rows: int, columns: int, depth: int, block: int, *words: str
) -> Grid:
    """A product in square tiles."""
    code = Code.of(f"koopman_{kernel}", *words, tile=f"BLOCK={block}")
    programs = -(-rows // block) * -(-columns // block)
    return Grid(code, of_koopman.WARPS[block], programs, -(-depth // _DEEP))


def _koopman_forward(k: int, squarings: int) -> Iterator[Grid]:
    """One operator for all pairs of 11 blocks; so many squarings before it has settled."""
    rows, now = 11 * PROMPTS, 10 * PROMPTS
    block = of_koopman.product(rows, k)
    square = of_koopman.square(k, 1, ahead_of_time.MULTIPROCESSORS[90])
    yield _square_tiles("lift", rows, k, WIDTH, block)
    yield _square_tiles("predict", now, k, k, block)
    yield Grid(Code.of("koopman_scale"), 4, 32, -(-k * k // (32 * 1024)))
    side = -(-k // square)
    upper = side * (side + 1) // 2
    tile_sums = f"TILES={power_of_2(side * side)}"
    kinds = ["PLAIN=True"], ["FIRST=True"], *(squarings - 2) * [["PLAIN=False", "FIRST=False"]]
    for kernel, words in (("split", []), *(("square", [*kind, tile_sums]) for kind in kinds)):
        code = Code.of(f"koopman_{kernel}", *words, tile=f"BLOCK={square}")
        yield Grid(code, of_koopman.WARPS[square], upper, -(-k // _DEEP))
    vector = Code.of("koopman_vector", tile=f"BLOCK_K={k}")
    yield Grid(vector, 4, -(-k // min(16, 8192 // k)))
    yield _square_tiles("image", 2 * now, k, k, block)
    yield Grid(Code.of("koopman_pair", tile=f"BLOCK_K={k}"), 4, 10, -(-k // block))
    yield Grid(Code.of("koopman_total"), 4, 1)


def _koopman_backward(k: int) -> Iterator[Grid]:
    rows, now = 11 * PROMPTS, 10 * PROMPTS
    block = of_koopman.product(rows, k)
    yield _square_tiles("bwd_points", 2 * now, k, k, block)
    yield _square_tiles("bwd_states", rows, k, k, block)
    yield _square_tiles("bwd_prompts", rows, WIDTH, k, of_koopman.gradient(rows * WIDTH))
    yield _square_tiles("bwd_lift", k, WIDTH, rows, of_koopman.gradient(k * WIDTH))
    block = of_koopman.gradient(k * k)
    for of_L, depth in ((False, now), (True, 2 * now)):
        yield _square_tiles("bwd_operators", k, k, depth, block, f"OF_L={of_L}")


# of csrc/koopman.cuh, by the side of a tile: depth of a stage, and a thread's multiply-adds of it
_STAGE = {16: (64, 64), 32: (32, 128), 64: (32, 512)}
_CUDA_WARPS = 8  # of a block of every kernel there but the one that finishes


def _cuda_product(
    kernel: str, block: int, tiles: int, depth: int, *words: str, **roles: int
) -> Grid:
    """Square tiles of a product, each with a sum over `depth`."""
    stage, fused = _STAGE[block]
    code = Code.of_cuda(" ".join([f"koopman_{kernel} {block}", *words]), fused, **roles)
    return Grid(code, _CUDA_WARPS, tiles, -(-depth // stage))


def _koopman_cuda(k: int, squarings: int) -> Iterator[Grid]:
    """As `_koopman_forward` and `_koopman_backward`; what stands beside a product in its launch
    has the same depth, and its tiles count with it.
    """
    rows, now = 11 * PROMPTS, 10 * PROMPTS
    block = of_koopman.product(rows, k)
    square = of_koopman.square(k, 1, ahead_of_time.MULTIPROCESSORS[90])
    tiles = lambda rows, columns, side=block: -(-rows // side) * -(-columns // side)
    upper = lambda side: (count := -(-k // side)) * (count + 1) // 2
    yield _cuda_product("lift", block, tiles(rows, k) + 32, WIDTH)  # 32 blocks look for max |L|
    yield _cuda_product("predict", block, tiles(now, k) + upper(block), k, roles=2)
    yield _cuda_product("image", block, tiles(2 * now, k) + upper(block), k, roles=2)
    yield _cuda_product("square", square, upper(square), k, "true")
    for _ in range(squarings - 2):
        yield _cuda_product("square", square, upper(square), k, "false")
    # a warp has 4 of a block's 32 rows, 16 of their strides of 32 columns in a turn
    vector = Code.of_cuda("koopman_vector", 17)
    inner = Code.of_cuda("koopman_vector", 16, role=2).loop
    more = 4 * max(0, -(-k // (32 * 16)) - 1) * inner
    yield Grid(vector, _CUDA_WARPS, -(-k // 32), 4, more)
    # a pair has a warp, whose lanes go twice over its prompts, once for the loss, once for slopes
    finish = Code.of_cuda("koopman_finish", 30)
    twice = sum(Code.of_cuda("koopman_finish", 30, role=role).loop for role in (1, 2))
    yield Grid(finish, 16, 1, 1, twice)

    yield _cuda_product("bwd_points", block, tiles(2 * now, k), k)
    yield _cuda_product("bwd_states", block, tiles(rows, k), k)
    block = of_koopman.gradient(rows * WIDTH + k * WIDTH + 2 * k * k)
    # d L reads most for a product and has the longest loop, d prompts the shortest
    for role, (height, width, depth) in enumerate(
        ((k, k, 2 * now), (k, k, now), (k, WIDTH, rows), (rows, WIDTH, k))
    ):
        count = tiles(height, width, block)
        yield _cuda_product("bwd_inputs", block, count, depth, roles=4, role=role)


def _spectrum_cuda() -> tuple[tuple[Grid, ...], tuple[Grid, ...]]:
    """Windows to tokens, and their pooling, of csrc/spectrum.cu in bf16."""
    window, patch, bins, threads = 16, 16, 16, 256
    lines, width = BATCH * (224 // patch), -(-WIDTH // threads)
    # a turn is one row of bins, 2 multiply-adds each beside 2 products
    strips = Grid(Code.of_cuda("strips bf16", 2 * bins, role=1), _CUDA_WARPS, BATCH * 3, window)
    # a turn has the multiply-adds of 4 taps, 2 a bin, inside one over channels
    outer, taps = (Code.of_cuda("taps bf16", 2 * bins, role=role) for role in (0, 1))
    inner = (width * (patch // 4) - width) * taps.loop
    # a turn is two columns of bins, each with its products and its turned sums
    tokens = Code.of_cuda("tokens TwoBf16 bf16 true", 100)
    made = (
        strips,
        Grid(outer, _CUDA_WARPS, 3 * patch, width, inner),
        Grid(tokens, _CUDA_WARPS, lines // 32 * (WIDTH // 64), window // 2),
    )
    # a warp has 8 of a block's 64 tokens; then threads have channels, and parts in turn
    pool, last = (Code.of_cuda("pool bf16 6", 64, role=role) for role in (0, 1))
    parts = BATCH * 196 // 64
    summed = Code.of_cuda("pool_sum bf16", 1)
    return made, (
        Grid(pool, _CUDA_WARPS, parts, 8, (width - 1) * last.loop),
        Grid(summed, _CUDA_WARPS, WIDTH // 32, parts // 8),
    )


def spectrum() -> Iterator[Pass]:
    """A window of 16 x 16 bins; operands of products from L2."""
    tokens, window, patch = BATCH * 196 * WIDTH * 2 / 1e6, 16, 16
    stem = "shortcut_strips_kernel, shortcut_taps_kernel, shortcut_tokens_kernel"
    pool = "shortcut_pool_kernel, shortcut_pool_sum_kernel"
    split, narrow = f"WIDTH={224}", "fp32,i64,bf16"
    strips, taps = of_spectrum._STRIPS, of_spectrum._TAPS
    tile = of_spectrum._tokens_launch(True, 3 * patch)
    of_tokens = Code.of("shortcut_tokens", "bf16,i64,fp32,bf16", f"DIM={WIDTH}")
    lines = BATCH * (224 // patch)
    grids = (
        Grid(
            Code.of("shortcut_strips", narrow, split, f"PATCH={patch}"),
            strips["num_warps"],
            BATCH * 3 * -(-224 // strips["BLOCK_H"]),
        ),
        Grid(
            Code.of("shortcut_taps", narrow, f"DIM={WIDTH}"),
            taps["num_warps"],
            3 * patch * WIDTH // taps["BLOCK_D"],
            -(-patch // taps["BLOCK_Q"]),
        ),
        Grid(
            of_tokens,
            tile["num_warps"],
            lines // tile["BLOCK_M"] * (WIDTH // tile["BLOCK_D"]),
            window // 2,
        ),
    )
    together = of_spectrum._pool_launch(WIDTH)
    parts = BATCH * 196 // together["PER_PROGRAM"]
    pooled = (
        Grid(
            Code.of("shortcut_pool", "bf16,i32,fp32", f"DIM={WIDTH}"),
            together["num_warps"],
            parts,
            together["PER_PROGRAM"] // together["ROWS"],
        ),
        Grid(
            Code.of("shortcut_pool_sum", "i32,fp32,bf16", f"DIM={WIDTH}"),
            4,
            WIDTH // 128,
            -(-parts // of_spectrum._PARTS["PARTS"]),
        ),
    )
    made, joined = _spectrum_cuda()
    for version, kernels, known in (
        ("", (stem, pool), ({"grids": grids, "code": of_tokens}, {"grids": pooled})),
        (", CUDA", ("csrc/spectrum.cu",) * 2, ({"grids": made}, {"grids": joined})),
    ):
        yield Pass(
            f"windows to tokens{version}", kernels[0], tokens + 11.2, 8.5, launches=3, **known[0]
        )
        yield Pass(f"pooling of tokens{version}", kernels[1], tokens * 1.1, launches=2, **known[1])


def adaptive() -> Iterator[Pass]:
    """Rows of an image mixed to prompts, and the bottleneck of 8 units behind it; the stream is
    fp32, as under autocast: products outside the tensor cores.
    """
    x, u = (BATCH * rows * WIDTH * 4 / 1e6 for rows in (ROWS, PROMPTS))
    units, wide = 8, f"WIDTH={WIDTH}"
    mix = 2 * BATCH * ROWS * PROMPTS * WIDTH / 1e9
    hidden = 2 * 2 * BATCH * PROMPTS * WIDTH * units / 1e9
    stats = of_adaptive._stats_launch(WIDTH)
    forward = of_adaptive._mix_launch(False, PROMPTS, WIDTH)
    backward = of_adaptive._mix_backward_launch(False, PROMPTS, WIDTH)
    rows = of_adaptive._rows_launch(units, WIDTH, of_adaptive._FORWARD_WARPS)
    sums = of_adaptive._sums_launch(units, WIDTH)
    tiles_p = -(-PROMPTS // forward["BLOCK_P"])
    of_rows = BATCH * -(-PROMPTS // rows["ROWS"])
    slots = of_adaptive._SLOTS * -(-PROMPTS // sums["BLOCK_P"]) * (WIDTH // sums["BLOCK_D"])
    row_stats = Grid(Code.of("row_stats", wide), stats["num_warps"], BATCH * ROWS // stats["ROWS"])
    mixed = Grid(
        Code.of("token_mix_fwd", wide),
        forward["num_warps"],
        BATCH * tiles_p * (WIDTH // forward["BLOCK_D"]),
        -(-ROWS // forward["BLOCK_N"]),
    )
    unmixed = Grid(
        Code.of("token_mix_bwd", wide),
        backward["num_warps"],
        BATCH * -(-ROWS // backward["BLOCK_N"]),
        2 * tiles_p * (WIDTH // backward["BLOCK_D"]),
    )
    made = Grid(Code.of("bottleneck_fwd", wide), rows["num_warps"], of_rows, 2 * units)
    back = (
        Grid(Code.of("bottleneck_bwd_units", wide), of_adaptive._UNITS_WARPS, of_rows, 3 * units),
        Grid(
            Code.of("bottleneck_bwd", wide), sums["num_warps"], slots, BATCH // of_adaptive._SLOTS
        ),
    )
    kernels = "prompt_bottleneck_bwd_units_kernel, prompt_bottleneck_bwd_kernel"
    for name, launched, mb, gflop, launches, grids in (
        (
            "token_mix forward",
            "row_stats_kernel, token_mix_fwd_kernel",
            x + u,
            mix,
            2,
            (row_stats, mixed),
        ),
        ("token_mix backward", "token_mix_bwd_kernel", 2 * x + u + 5, 3 * mix, 2, (unmixed,)),
        ("prompt_bottleneck forward", "prompt_bottleneck_fwd_kernel", 2 * u, hidden, 1, (made,)),
        ("prompt_bottleneck backward", kernels, 3 * u, 3 * hidden, 3, back),
    ):
        yield Pass(
            name, launched, mb, gflop, launches=launches, slowdown=1 / FP32_PER_PRODUCT,
            grids=grids, code=grids[-1].code,
        )  # fmt: skip


def step() -> Iterator[Pass]:
    """All of a step, passes one after the other: products at 0.75 of the large one's rate."""
    shape = cost.Shape.named(shapes.BASE, num_classes=shapes.CLASSES)
    issued = {p.name: p.instructions for p in (*attention(), *pointwise())}
    blocks = shape.depth
    once = ("attention forward", "attention backward", "gelu/forward", "gelu/backward")
    names = *once, *2 * ("norm/forward", "norm/backward")
    instructions = blocks * sum(issued[name] for name in names)
    for batch in (BATCH, 16):
        at = shape, PROMPTS, batch
        for row, host_us in (("pae keep", Host.of("keep").us), ("pae graphed", 0.0)):
            yield Pass(
                f"step of {batch}, {row}", "all", cost.live_step_bytes(*at, 2) / 1e6,
                cost.live_step_flops(*at) / 1e9, cost.flops(*at).step / 0.75 / 1e9,
                instructions * batch / BATCH, launches=30 * blocks, host_us=host_us,
                row=(f"step/{shapes.BASE}/P{PROMPTS}/bf16/B{batch}", row),
            )  # fmt: skip


def host_bound() -> dict[str, dict]:
    """Of every counted step the host's work and time, and below which batch a step waits for it: by
    the time of "keep" on the card, which grows with the batch. Others take the GPU longer, so that
    they wait below fewer images.
    """
    graphed = next(p for p in step() if p.row[1] == "pae graphed")
    found = {}
    for name in steps():
        host = Host.of(name)
        found[name] = asdict(host) | {"expected_us": float(f"{host.us:.3g}")}
        if name != "ranking":  # which is no step
            for card, seen in CARDS.items():
                share = host.us / graphed.expected_us(seen)
                found[name][f"{card} waits below batch"] = round(BATCH * share)
    return found


def passes() -> list[Pass]:
    """Of every kernel, at ViT-B/16, 224 pixels, B = 128, P = 50, bf16."""
    groups = attention, pointwise, of_other_blocks, products, koopman, spectrum, adaptive, step
    return [p for group in groups for p in group()]


def predicted() -> dict:
    """The content of `FILE`."""
    return {
        "model": "bench/predictions.py",
        "cards": {name: asdict(card) for name, card in CARDS.items()},
        "host": host_bound(),
        "passes": [
            {"name": p.name, "kernels": p.kernels, "group": p.row[0], "row": p.row[1]}
            | ({"registers": p.code.registers, "resident": p.code.programs} if p.code else {})
            | {
                name: {
                    "floor_us": float(f"{p.floor_us(card):.3g}"),
                    "expected_us": float(f"{p.expected_us(card):.3g}"),
                }
                for name, card in CARDS.items()
            }
            for p in passes()
        ],
    }


def text() -> str:
    return json.dumps(predicted(), indent=1) + "\n"


def beside(run: Run) -> str:
    """Predicted and measured, for the two ceilings that this run measured, of what it measured."""
    found = run.machine
    seen = found.get("copy GB/s"), found.get("bf16 product TFLOP/s")
    if None in seen:
        return "No prediction: the run lacks a ceiling."
    known = next((c for name, c in CARDS.items() if name in run.device), CARDS["H100"])
    card = Card(*seen, known.multiprocessors, known.clock_ghz)
    rows = []
    for p in passes():
        here = measured(run.groups.get(p.row[0], ()))
        us = here[p.row[1]].median * 1e6 if p.row[1] in here else None
        floor, expected = p.floor_us(card), p.expected_us(card)
        rows.append(
            {
                "pass": p.name,
                "floor us": table.digits(floor),
                "predicted us": table.digits(expected),
                "measured us": table.digits(us) if us else "",
                "of predicted": table.ratio(us / expected) if us else "",
            }
        )
    ceilings = f"copy {seen[0]:.0f} GB/s, bf16 product {seen[1]:.0f} TFLOP/s"
    return f"**Predicted and measured** ({ceilings})\n\n{table.table_of(rows)}"


def main() -> None:
    about = str(__doc__).partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.predictions", description=about)
    parser.add_argument("run", nargs="?", type=Path, help="a measured run's JSON: shown beside")
    run = parser.parse_args().run
    if run is not None:
        print(beside(Run.of(json.loads(run.read_text()))))
        return
    write_atomically(FILE, lambda path: path.write_text(text()))
    print(FILE)


if __name__ == "__main__":
    main()
