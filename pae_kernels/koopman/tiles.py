"""Sides of the square output tiles that the kernels of `koopman_losses` work in."""

from __future__ import annotations

from collections.abc import Callable

# The largest tile with about as many tiles as a GPU has multiprocessors, 100 to 150: a larger one
# does more per entry it reads, fewer tiles leave multiprocessors idle. Reckoned, not measured.
TILES, ENOUGH = (64, 32, 16), 100


def product(rows: int, columns: int) -> int:
    """For products with `rows` by `columns` outputs in one launch."""
    return _largest(lambda tile: -(-rows // tile) * -(-columns // tile), ENOUGH)


def gradient(outputs: int) -> int:
    """For the gradients of the inputs, so many entries in one launch.

    Their sums run over all rows of all blocks: several tiles for each multiprocessor share that
    depth out better than few large ones.
    """
    return _largest(lambda tile: outputs // tile**2, 4 * ENOUGH)


def square(k: int, matrices: int) -> int:
    """For the square of `matrices` symmetric matrices, of which the upper triangle is computed."""

    def count(tile: int) -> int:
        side = -(-k // tile)
        return matrices * side * (side + 1) // 2

    return _largest(count, ENOUGH)


def _largest(count: Callable[[int], int], enough: int) -> int:
    return next((tile for tile in TILES if count(tile) >= enough), TILES[-1])
