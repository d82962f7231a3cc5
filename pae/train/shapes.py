"""Images drawn for structured tasks: how many discs, which way a bar lies. Nothing is fetched.

What VTAB calls structured asks for geometry, not for what a thing is, and its sets are drawn too.
Every image is a function of its number alone, in grey, 64 pixels wide, with noise on it.
"""

from __future__ import annotations

import numpy as np

SIDE = 64
COUNTS = ("1", "2", "3", "4", "5", "6")
ANGLES = tuple(f"{180 * k / 8:g} degrees" for k in range(8))


def _grid() -> tuple[np.ndarray, np.ndarray]:
    places = np.arange(SIDE, dtype=np.float64)
    return places[:, None], places[None, :]


def _finished(image: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    noisy = image + 25 * draw.random((SIDE, SIDE)) - 12.5
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def count(number: int) -> tuple[np.ndarray, list[int]]:
    """(N, 64, 64) uint8 with 1 to 6 discs that do not touch, of several sizes and greys; labels
    from 0.
    """
    y, x = _grid()
    images, labels = np.empty((number, SIDE, SIDE), np.uint8), []
    for i in range(number):
        draw = np.random.default_rng([1, i])
        wanted = i % len(COUNTS) + 1
        discs: list[tuple[float, float, float]] = []
        image = np.full((SIDE, SIDE), 20 + 60 * draw.random())
        while len(discs) < wanted:
            radius = 3 + 4 * draw.random()
            cy, cx = radius + (SIDE - 2 * radius) * draw.random(2)
            if all(np.hypot(cy - b, cx - c) > radius + r + 2 for b, c, r in discs):
                discs.append((cy, cx, radius))
                image[np.hypot(y - cy, x - cx) <= radius] = 130 + 110 * draw.random()
        images[i] = _finished(image, draw)
        labels.append(wanted - 1)
    return images, labels


def angle(number: int) -> tuple[np.ndarray, list[int]]:
    """(N, 64, 64) uint8 with one bar, of several lengths, widths, places and greys; the label k
    says that it lies within 8 degrees of 22.5 k.
    """
    y, x = _grid()
    images, labels = np.empty((number, SIDE, SIDE), np.uint8), []
    for i in range(number):
        draw = np.random.default_rng([2, i])
        label = i % len(ANGLES)
        turn = np.deg2rad(22.5 * label + 16 * draw.random() - 8)
        length, width = 12 + 10 * draw.random(), 2 + 3 * draw.random()
        cy, cx = 20 + 24 * draw.random(2)
        along = (x - cx) * np.cos(turn) - (y - cy) * np.sin(turn)
        across = (x - cx) * np.sin(turn) + (y - cy) * np.cos(turn)
        image = np.full((SIDE, SIDE), 20 + 60 * draw.random())
        image[(np.abs(along) <= length) & (np.abs(across) <= width)] = 130 + 110 * draw.random()
        images[i] = _finished(image, draw)
        labels.append(label)
    return images, labels


MASKS = ("background", "disc", "square", "triangle")


def masks(number: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, 64, 64) uint8 with 1 or 2 shapes that do not touch, of several sizes and greys, and as
    many masks of their class numbers, 0 for the ground.
    """
    y, x = _grid()
    images = np.empty((number, SIDE, SIDE), np.uint8)
    labels = np.zeros((number, SIDE, SIDE), np.uint8)
    for i in range(number):
        draw = np.random.default_rng([3, i])
        image = np.full((SIDE, SIDE), 20 + 60 * draw.random())
        placed: list[tuple[float, float, float]] = []
        for k in range(1 + i % 2):
            for _ in range(50):  # the second may find no room
                radius = 12 + 6 * draw.random()
                cy, cx = radius + 1 + (SIDE - 2 * radius - 2) * draw.random(2)
                if all(np.hypot(cy - b, cx - c) > radius + r + 1 for b, c, r in placed):
                    break
            else:
                continue
            placed.append((cy, cx, radius))
            kind = (i // 2 + k) % 3 + 1
            inside = _shape(kind, y - cy, x - cx, radius)
            labels[i][inside] = kind
            image[inside] = 130 + 110 * draw.random()
        images[i] = _finished(image, draw)
    return images, labels


def _shape(kind: int, y: np.ndarray, x: np.ndarray, radius: float) -> np.ndarray:
    """Where a disc (1), an upright square (2) or triangle (3) is that the circle holds."""
    if kind == 1:
        return np.hypot(y, x) <= radius
    sides = 4 if kind == 2 else 3
    reach = radius * np.cos(np.pi / sides)  # of a side from the middle
    angles = np.pi / 2 + 2 * np.pi * np.arange(sides) / sides
    return np.all([y * np.sin(a) + x * np.cos(a) <= reach for a in angles], axis=0)
