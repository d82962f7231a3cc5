"""Pictures of an analysis. Each function returns a matplotlib `Figure` of its own: nothing is
shown, no global state is touched; `figure.savefig(file)` writes it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..mpa import MPAResult
from .koopman import KoopmanAnalysis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by the colour-blind, also in grey
BLUE, RED, GREY = "#0072B2", "#D55E00", "#8A8A8A"
UNIT = 1 + 1e-9  # a modulus of 1 but for rounding is not outside
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "legend.frameon": False,
}


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """`draw` in the style of this file, whatever the user's matplotlib is set to."""

    @wraps(draw)
    def inner(*args: Any, **options: Any) -> Figure:
        from matplotlib import rc_context, rcParamsDefault

        defaults: dict[Any, Any] = {
            k: v for k, v in rcParamsDefault.items() if not k.startswith("backend")
        }
        with rc_context(defaults | _STYLE):
            return draw(*args, **options)

    return inner


def _panels(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """A figure of that many inches and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    return figure, figure.subplots(rows, columns, **options)


@_styled
def draw_eigenvalues(analysis: KoopmanAnalysis) -> Figure:
    """Eigenvalues of all operators beside the unit circle; on the right, closer."""
    values = analysis.eigenvalues.numpy()
    figure, (whole, close) = _panels(6.4, 3.2, 1, 2)
    for ax in (whole, close):
        turn = np.linspace(0, 2 * np.pi, 721)
        ax.plot(np.cos(turn), np.sin(turn), color=GREY, linewidth=0.8, label="unit circle")
        ax.set_xlabel("Re λ")
        ax.set_aspect("equal")
    dots = [_dots(ax, values, analysis.blocks) for ax in (whole, close)]
    whole.set_ylabel("Im λ")
    reach = 1.08 * max(1.0, np.abs(values).max())
    whole.set(xlim=(-reach, reach), ylim=(-reach, reach))
    middle = complex(values.real.max() + values.real.min(), 0) / 2
    reach = 1.15 * max(np.ptp(values.real) / 2, np.abs(values.imag).max(), 1e-3)
    close.set(xlim=(middle.real - reach, middle.real + reach), ylim=(-reach, reach))
    close.set_title("enlarged; grey: the unit circle")
    radius = analysis.spectral_radius
    if len(values) == 1:
        beyond = int((np.abs(values) > UNIT).sum())
        whole.set_title(f"spectral radius {radius[0]:.3f}, {beyond} of {values.size} outside")
    else:
        whole.set_title(f"spectral radii {radius.min():.3f} to {radius.max():.3f}")
        bar = figure.colorbar(dots[1], ax=close, label="from block", shrink=0.8)
        bar.outline.set_visible(False)
        bar.set_ticks(analysis.blocks[:-1])
    return figure


def _dots(ax: Axes, values: np.ndarray, blocks: tuple[int, ...]) -> PathCollection:
    """One operator: blue inside the circle and red beyond; several: coloured by block."""
    style: dict[str, Any] = {"s": 9, "linewidths": 0, "alpha": 0.8, "zorder": 3}
    if len(values) == 1:
        colours = np.where(np.abs(values) > UNIT, RED, BLUE)
        return ax.scatter(values.real, values.imag, c=colours[0].tolist(), **style)
    number = np.broadcast_to(np.array(blocks[:-1])[:, None], values.shape)
    return ax.scatter(values.real, values.imag, c=number, cmap="cividis", **style)


@_styled
def draw_energies(analysis: KoopmanAnalysis, modes: int = 64) -> Figure:
    """Share of the prompts' energy in each mode, mean and range over the blocks, below the modulus
    of its eigenvalue; the first `modes` modes by modulus.
    """
    shares = 100 * analysis.energy_shares.numpy()[:, :modes]
    moduli = analysis.eigenvalues.abs().numpy()[:, :modes]
    number = np.arange(1, shares.shape[1] + 1)
    figure, (upper, lower) = _panels(
        6.4, 3.4, 2, 1, sharex=True, gridspec_kw={"height_ratios": [1, 2]}
    )
    upper.axhline(1.0, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), label="unit circle")
    band = {"label": "range over the blocks"} if len(moduli) > 1 else {}
    low, high = moduli.min(0), moduli.max(0)
    upper.fill_between(number, low, high, color=BLUE, alpha=0.2, linewidth=0, **band)
    upper.plot(number, moduli.mean(0), color=BLUE, linewidth=1.2, label="|λ|")
    upper.legend(loc="lower left", ncols=3, fontsize=8)
    upper.set_ylabel("|λ|")
    mean = shares.mean(0)
    reach = np.stack([mean - shares.min(0), shares.max(0) - mean])
    lower.bar(number, mean, width=0.8, color=BLUE, linewidth=0, label="mean over the blocks")
    if len(shares) > 1:
        style = {"fmt": "none", "ecolor": "black", "elinewidth": 0.6}
        lower.errorbar(number, mean, reach, label="range over the blocks", **style)
        lower.legend(loc="upper right", fontsize=8)
    lower.set_xlabel("mode, by falling |λ|")
    lower.set_ylabel("share of energy (%)")
    lower.set_ylim(0, 1.4 * shares.max())  # room for the legend
    lower.set_xlim(0.25, number[-1] + 0.75)
    held, total = mean.sum(), analysis.energies.shape[1]
    title = f"{len(number)} of {total} modes hold {held:.0f} % of the energy"
    if "orthonormal" in analysis.basis:
        title += f"; modes nearly parallel (condition {analysis.condition.max():.0e}): Schur basis"
    upper.set_title(title)
    return figure


@_styled
def draw_lyapunov(analysis: KoopmanAnalysis) -> Figure:
    """V over the blocks, mean over the prompts: where they are, and where K would have them."""
    figure, ax = _panels(5.0, 3.0)
    blocks = analysis.blocks
    now, predicted, after = (
        t.numpy()
        for t in (analysis.lyapunov_now, analysis.lyapunov_predicted, analysis.lyapunov_next)
    )
    if analysis.mode == "global":  # with layerwise L, V of a block depends on the pair
        rows = np.concatenate([now, after[-1:]])
        low, high = np.quantile(rows, [0.1, 0.9], axis=1)
        ax.fill_between(
            blocks, low, high, color=BLUE, alpha=0.15, linewidth=0, label="80 % of the prompts"
        )
    for j, (here, there) in enumerate(pairwise(blocks)):
        label = {"label": "prompts"} if j == 0 else {}
        ends = [now[j].mean(), after[j].mean()]
        ax.plot([here, there], ends, color=BLUE, linewidth=1.4, marker="o", markersize=3, **label)
        label = {"label": "predicted by K"} if j == 0 else {}
        ends = [now[j].mean(), predicted[j].mean()]
        ax.plot([here, there], ends, color=RED, linewidth=1.0, linestyle=(0, (4, 2)), **label)
    ax.set_xlabel("block")
    ax.set_xticks(blocks)
    scaled = analysis.formulation == "code"
    ax.set_ylabel("V(z), share of its maximum" if scaled else "V(z) = |L z|²")
    ax.set_title("energy of the prompts, and where K would have it")
    ax.legend(fontsize=8)
    return figure


@_styled
def draw_window_losses(result: MPAResult, image_size: tuple[int, int] | None = None) -> Figure:
    """Loss of the batch seen through each window, at the window's place in the centred spectrum.

    Args:
        image_size: (H, W) of the images that were ranked; None: the last window ends at the border,
            as with 224 pixels, window 16 and stride 8.
    """
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    origins = result.origins
    size = image_size or tuple((origins.max(0).values + result.window).tolist())
    # bin s // 2 of a centred spectrum is frequency 0
    centres = [
        torch.unique(origins[:, i]).double() + (result.window - 1) / 2 - size[i] // 2
        for i in (0, 1)
    ]
    table = result.losses.double().reshape(len(centres[0]), len(centres[1])).numpy()
    half = result.stride / 2
    edges = [float(f) for c in (centres[1], centres[0]) for f in (c[0] - half, c[-1] + half)]
    figure, ax = _panels(4.6, 3.9)
    # rows grow downwards in the spectrum, as in the image
    picture = ax.imshow(table, extent=(edges[0], edges[1], edges[3], edges[2]), cmap="cividis")
    bar = figure.colorbar(picture, ax=ax, label="cross-entropy (nats)", shrink=0.85)
    bar.outline.set_visible(False)
    for s in result.selected.tolist():
        row, column = divmod(s, len(centres[1]))
        corner = (float(centres[1][column]) - half, float(centres[0][row]) - half)
        side = result.stride
        ax.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=RED, linewidth=1.1))
    outline = {"path_effects": [withStroke(linewidth=2.5, foreground="black")]}
    ax.plot(0, 0, marker="+", color="white", markersize=8, markeredgewidth=1.2, **outline)
    ax.annotate("DC", (0, 0), (5, 5), textcoords="offset points", color="white", **outline)
    ax.set_xlabel("horizontal frequency (cycles per image)")
    ax.set_ylabel("vertical frequency (cycles per image)")
    ax.set_title(f"outlined: the {len(result.selected)} selected of {len(result.losses)} windows")
    for spine in ax.spines.values():
        spine.set_visible(False)
    return figure
