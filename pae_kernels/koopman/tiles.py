"""Sides of the square output tiles that the kernels of `koopman_losses` work in."""

from __future__ import annotations

from collections.abc import Callable

# Of products the largest tile with about as many tiles as a GPU has multiprocessors, 100 to 150: a
# larger one does more per entry it reads, fewer tiles leave multiprocessors idle. Reckoned, not
# measured, as all here.
TILES, ENOUGH = (64, 32, 16), 100
WARPS = {64: 8, 32: 4, 16: 2}  # of a program
# what a warp issues for 32 entries of a squaring's depth, from its machine code for sm_90
ISSUED = {64: 633, 32: 409, 16: 248}
WORTH = 0.9  # a smaller tile reads each entry twice as often, so it must win a tenth


def product(rows: int, columns: int) -> int:
    """For products with `rows` by `columns` outputs in one launch."""
    return _largest(lambda tile: -(-rows // tile) * -(-columns // tile), ENOUGH)


def gradient(outputs: int) -> int:
    """For the gradients of the inputs, so many entries in one launch.

    Their sums run over all rows of all blocks: several tiles for each multiprocessor share that
    depth out better than few large ones.
    """
    return _largest(lambda tile: outputs // tile**2, 4 * ENOUGH)


def square(k: int, matrices: int, multiprocessors: int) -> int:
    """For the square of `matrices` symmetric matrices, of which the upper triangle is computed.

    The tile whose fullest multiprocessor is done first: all tiles start at once, and a
    multiprocessor issues four instructions a cycle, a warp one. At k = 1024 as many tiles of 64 as
    132 multiprocessors have, and four more, would take twice the time of one each.
    """

    def cycles(tile: int) -> float:
        side = -(-k // tile)
        most = -(-matrices * side * (side + 1) // 2 // multiprocessors)
        return max(1, most * WARPS[tile] / 4) * ISSUED[tile]

    best = TILES[0]
    for tile in TILES[1:]:
        if cycles(tile) < WORTH * cycles(best):
            best = tile
    return best


def _largest(count: Callable[[int], int], enough: int) -> int:
    return next((tile for tile in TILES if count(tile) >= enough), TILES[-1])
