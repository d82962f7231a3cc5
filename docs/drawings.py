"""The drawings of "How it works", one per fact: `python -m docs.drawings [NAME ...]`.

Sizes are to scale for the shape they name, and every number in them is computed here: from shapes,
or by running the library. Written to docs/figures/ as SVG and PNG, the same bytes on every run.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from timm.models.vision_transformer import VisionTransformer

import pae
from bench.figures import COLOURS, figure, save, style
from pae_kernels import prompt_attention, shortcut_images

FIGURES = Path(__file__).parent / "figures"
LIVE, PROMPT, DEAD, INK = COLOURS["pae"], COLOURS["sdpa"], "#DDDDDD", "#333333"
PALE = "#BFDDEE"


class Shape(NamedTuple):
    """Sizes of a ViT with P prompts in every block; k is the Koopman width."""

    N: int = 197
    P: int = 50
    D: int = 768
    H: int = 12
    F: int = 3072
    depth: int = 12
    k: int = 256


VIT_B = Shape()
DRAWINGS: dict[str, Callable[[], Figure]] = {}


def drawing(draw: Callable[[], Figure]) -> Callable[[], Figure]:
    """Enter `draw` under its name with hyphens; it runs in the style of all figures."""

    def styled() -> Figure:
        with style():
            torch.manual_seed(0)
            return draw()

    DRAWINGS[draw.__name__.replace("_", "-")] = styled
    return styled


def blank(width: float, height: float, columns: int = 1, **options):
    """A figure of panels without axes: figure, panel or array of panels."""
    made, axes = figure(width, height, 1, columns, **options)
    for panel in made.axes:
        panel.set_axis_off()
    return made, axes


def box(ax: Axes, x, y, w, h, colour, text="", dead=False, size=8.5, **options) -> None:
    """A rectangle with text in the middle; `dead` is grey and hatched: never computed."""
    look = {"facecolor": colour, "edgecolor": "white", "linewidth": 1.0} | options
    if dead:
        look |= {"facecolor": DEAD, "edgecolor": "white", "hatch": "////"}
    ax.add_patch(Rectangle((x, y), w, h, **look))
    if text:
        ink = INK if dead or look["facecolor"] in (DEAD, PALE, "white") else "white"
        ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", color=ink, fontsize=size)


def step(ax: Axes, x, y, w, text, live=True, colour=LIVE) -> None:
    """A rounded box of a chain; greyed where it no longer exists."""
    look = {"boxstyle": "round,pad=0.02,rounding_size=0.08", "linewidth": 0.8}
    face, edge = (colour, colour) if live else ("white", "#AAAAAA")
    patch = FancyBboxPatch((x, y), w, 0.62, facecolor=face, edgecolor=edge, **look)
    patch.set_linestyle("-" if live else "--")
    ax.add_patch(patch)
    ink = "white" if live else "#999999"
    ax.text(x + w / 2, y + 0.31, text, ha="center", va="center", color=ink, fontsize=7.5)


def arrow(ax: Axes, start, end, colour=INK, dead=False, curve=0.0, width=1.1) -> None:
    line = (0, (3, 3)) if dead else "-"
    look = {"arrowstyle": "-|>", "mutation_scale": 9, "shrinkA": 0, "shrinkB": 0}
    look |= {"color": "#BBBBBB" if dead else colour, "linewidth": width, "linestyle": line}
    ax.add_patch(FancyArrowPatch(start, end, connectionstyle=f"arc3,rad={curve}", **look))


def note(ax: Axes, x, y, text, **options) -> None:
    look = {"fontsize": 8.5, "color": INK, "va": "center"} | options
    ax.text(x, y, text, **look).set_in_layout(False)


def bound(difference: float) -> str:
    """A power of ten above it, by a factor of 10 to 100: rounding is not the same everywhere."""
    return f"1e{math.ceil(math.log10(difference)) + 1}"


def rounded(value: float) -> float:
    """To three digits: the last ones are not the same everywhere."""
    return float(f"{value:.3g}")


def caption(ax: Axes, text: str) -> None:
    ax.set_title(text, fontweight="normal", fontsize=9)


@drawing
def dead_rows() -> Figure:
    """Fact 1: rows of a middle block times what is computed for them; area is FLOPs."""
    s = VIT_B
    attention = 4 * (s.N + s.P) * s.D
    square = 2 * s.D * s.D
    work = {"q": square, "k": square, "v": square, "attend": attention, "proj": square}
    work |= {"MLP fc1": 2 * s.D * s.F, "MLP fc2": 2 * s.D * s.F}
    total = sum(work.values())
    kept = {"k", "v"}
    dead = s.P * sum(w for name, w in work.items() if name not in kept)
    share = dead / ((s.N + s.P) * total)
    made, ax = blank(8.2, 3.0)
    x = 0.0
    for name, flops in work.items():
        w = 10 * flops / total
        box(ax, x, 0, w, s.N, LIVE, name, size=7.5)
        if name in kept:
            box(ax, x, s.N, w, s.P, PROMPT, "once")
        else:
            box(ax, x, s.N, w, s.P, DEAD, dead=True)
        x += w
    note(ax, -0.1, s.N / 2, f"{s.N} image\nrows", ha="right")
    note(ax, -0.1, s.N + s.P / 2, f"{s.P} prompt\nrows", ha="right")
    ax.set(xlim=(-1.1, 10.05), ylim=(-2, s.N + s.P + 2))
    caption(
        ax,
        f"A middle block of ViT-B/16 with {s.P} prompts. Area is work. Hatched is cut off before "
        f"anyone reads it:\n{share:.0%} of the reference's products. Keys and values of prompts "
        "(orange) are made once for the whole batch.",
    )
    return made


@drawing
def shared_prompts() -> Figure:
    """Fact 2: whose keys and values are formed, for a batch of four, to scale."""
    s, batch = VIT_B, 4
    made, (left, right) = blank(8.2, 3.2, 2, width_ratios=[s.P + s.N, s.P + s.N + 70])
    for ax, shared in ((left, False), (right, True)):
        for b in range(batch):
            y = (batch - 1 - b) * 1.2
            if not shared:
                box(ax, 0, y, s.P, 0.9, PROMPT, "P")
            box(ax, s.P, y, s.N, 0.9, LIVE, f"image {b + 1}: N rows")
        rows = s.P + batch * s.N if shared else batch * (s.P + s.N)
        ax.set_title(f"{'pae' if shared else 'reference'}: {rows} rows of keys and values")
        ax.set(xlim=(-70 if shared else 0, s.P + s.N + 2), ylim=(-0.75, batch * 1.2))
    middle = (batch - 1) * 0.6
    box(right, -68, middle, s.P, 0.9, PROMPT, "P")
    for b in range(batch):
        y = (batch - 1 - b) * 1.2 + 0.45
        arrow(right, (-17, middle + 0.62), (s.P - 3, y + 0.14), PROMPT)
        arrow(right, (s.P - 3, y - 0.14), (-17, middle + 0.28), INK, width=0.8)
    note(right, -68, -0.4, "orange: read by every image. black: gradients, one sum over the batch",
         fontsize=7.5)  # fmt: skip
    return made


def _scores(ax: Axes, N: int, P: int, live: Callable[[int, int], bool]) -> None:
    """A score matrix, queries down and keys across, prompts first; dead cells grey."""
    size = P + N
    colours = [
        [to_rgb((PROMPT if j < P else LIVE) if live(i, j) else DEAD) for j in range(size)]
        for i in range(size)
    ]
    ax.imshow(colours, extent=(0, size, -size, 0), interpolation="nearest")
    for line in range(size + 1):
        ax.plot([0, size, math.nan, line, line], [-line, -line, math.nan, 0, -size],
                color="white", linewidth=0.5)  # fmt: skip
    ax.set(xlim=(-0.5, P + N + 0.5), ylim=(-P - N - 2.2, 0.5), aspect="equal")
    note(ax, P / 2, -P - N - 1.2, "prompts", ha="center", fontsize=7.5)
    note(ax, P + N / 2, -P - N - 1.2, "keys: class row and patches", ha="center", fontsize=7.5)


@drawing
def class_query() -> Figure:
    """Fact 3: which attention scores of a head are needed, in a middle and in the last block."""
    s, N, P = VIT_B, 17, 5
    made, (left, middle, right) = blank(8.2, 3.3, 3)
    panels = {
        left: ("reference, every block", lambda i, j: True, s.N + s.P),
        middle: ("pae, middle blocks", lambda i, j: i >= P, s.N),
        right: ("pae, last block", lambda i, j: i == P, 1),
    }
    for ax, (title, live, queries) in panels.items():
        _scores(ax, N, P, live)
        ax.set_title(f"{title}\n{queries} x {s.N + s.P} scores a head")
    return made


@drawing
def gradient_flow() -> Figure:
    """Fact 4: what the backward pass visits; here prompts enter in blocks 4 to 11."""
    s, first = VIT_B, 4
    made, ax = blank(8.2, 3.4)
    for i in range(s.depth):
        prompted = i >= first
        box(ax, i, 0, 0.82, 0.8, LIVE if prompted else PALE, f"{i}")
        arrow(ax, (i - 0.18, 0.58), (i, 0.58), INK)
        arrow(ax, (i, 0.22), (i - 0.18, 0.22), LIVE, dead=i <= first, width=1.6)
        if prompted:
            box(ax, i + 0.2, 1.25, 0.42, 0.34, PROMPT, f"P{i}", size=6.5)
            arrow(ax, (i + 0.34, 1.25), (i + 0.34, 0.8), INK, width=0.8)
            arrow(ax, (i + 0.5, 0.8), (i + 0.5, 1.25), PROMPT, width=1.4)
    arrow(ax, (s.depth - 0.18, 0.58), (s.depth, 0.58), INK)
    arrow(ax, (s.depth, 0.22), (s.depth - 0.18, 0.22), LIVE, width=1.6)
    box(ax, s.depth, 0, 0.82, 0.8, PROMPT, "head", size=7.5)
    note(ax, 0, 1.42, "black: forward\nblue, orange: gradients\ngrey: never asked for")
    y = -1.75
    box(ax, 0.2, y, 1.2, 0.62, PALE, "X", dead=True)
    arrow(ax, (1.4, y + 0.31), (2.2, y + 0.31))
    box(ax, 2.2, y, 1.6, 0.62, LIVE, "Y = X Wᵀ")
    note(ax, 0.8, y - 0.3, "not kept", ha="center")
    box(ax, 5.0, y, 2.2, 0.62, LIVE, "dX = dY W")
    box(ax, 8.0, y, 2.2, 0.62, DEAD, "dW = dYᵀ X", dead=True)
    note(ax, 0.2, y + 0.95, "inside, a frozen product")
    note(ax, 5.0, y - 0.3, "needs W alone")
    note(ax, 8.0, y - 0.3, "would need X")
    ax.set(xlim=(-0.3, s.depth + 1), ylim=(-2.3, 1.8))
    return made


@drawing
def folding() -> Figure:
    """Fact 5: the steps of one block as timm runs them, and what is left of them."""
    reference = [
        ("(x-μ)/σ", True), ("·γ", False), ("+β", False), ("W_qkv", True), ("+b", True),
        ("·d^-½", False), ("attend", True), ("W_proj", True), ("+b", False), ("·ls1", False),
        ("+x", True),
        ("(x-μ)/σ", True), ("·γ", False), ("+β", False), ("W_1", True), ("+b", True),
        ("GELU", True), ("W_2", True), ("+b", False), ("·ls2", False), ("+x", True),
    ]  # fmt: skip
    folded = {"W_qkv": "W'_qkv", "W_proj": "W'_proj", "W_1": "W'_1", "W_2": "W'_2", "+b": "+b'"}
    ours = [(folded.get(text, text), live) for text, live in reference]
    made, ax = blank(8.2, 2.9)
    half = reference.index(("+x", True)) + 1
    for row, (chain, who) in enumerate(((reference, "timm"), (ours, "the plan"))):
        for i, (text, live) in enumerate(chain):
            line, column = divmod(i, half)
            y = -(2 * row * 0.95 + line * 0.8 + row * 0.35)
            step(ax, 1.3 + column * 1.02, y, 0.9, text, live or row == 0,
                 COLOURS["plain"] if row == 0 else LIVE)  # fmt: skip
        note(ax, 0, -(2 * row * 0.95 + row * 0.35) - 0.1, who, fontweight="bold")
    left = sum(live for _, live in reference)
    ax.set(xlim=(-0.1, 1.3 + half * 1.02), ylim=(-3.2, 0.75))
    caption(
        ax,
        f"One block: {left} of {len(reference)} steps remain. \u03b3, \u03b2, the logit scale and "
        "LayerScale move into the weights;\nthe biases of the two last products ride in the sum "
        "behind them.",
    )
    return made


@drawing
def equal_prompts() -> Figure:
    """Fact 6: softmax over P equal keys and some others, and over one key with + log P."""
    P, N, d = 8, 5, 16
    qkv = torch.randn(1, N, 3, 1, d, dtype=torch.float64)
    one = torch.randn(1, 1, 2, 1, d, dtype=torch.float64)
    log = torch.full((1, 1), math.log(P), dtype=torch.float64)
    many_out, _ = prompt_attention(qkv, one.expand(1, P, 2, 1, d))
    one_out, _ = prompt_attention(qkv, one, log_multiplicity=log)
    difference = (many_out - one_out).abs().max().item()
    query, keys = qkv[0, 0, 0, 0], qkv[0, :, 1, 0]
    scores = torch.cat([(one[0, :, 0, 0] @ query).expand(P), keys @ query]) * d**-0.5
    many = scores.softmax(0)
    single = torch.cat([scores[:1] + math.log(P), scores[P:]]).softmax(0)
    made, (left, right) = figure(8.2, 2.7, 1, 2, sharey=True, width_ratios=[P + N, 1 + N])
    left.bar(range(P + N), many.tolist(), color=[PROMPT] * P + [LIVE] * N)
    left.set_title(f"{P} equal prompts, {N} image keys")
    left.set_ylabel("attention weight")
    right.bar(range(1 + N), single.tolist(), color=[PROMPT] + [LIVE] * N)
    right.set_title(f"one prompt, its logit + log {P}")
    left.set_xlabel(f"prompt weights, summed: {many[:P].sum():.4f}")
    right.set_xlabel(f"prompt weight: {single[0]:.4f}")
    for ax in (left, right):
        ax.set_xticks([])
    made.suptitle(f"The outputs differ by less than {bound(difference)}, in fp64", fontsize=9)
    return made


@drawing
def koopman_pairs() -> Figure:
    """Fact 7: matrices that KLD forms in a step, to scale: pair by pair, and at once."""
    s = VIT_B
    pairs = s.depth - 2
    made, (left, right) = blank(8.2, 3.0, 2, width_ratios=[3.2, 1.6])
    k, P, gap = s.k, s.P, 60
    for j in range(pairs):
        x = (j % 5) * (k + gap)
        y = -(j // 5) * (k + P + 2 * gap)
        box(left, x, y, k, P, PROMPT)
        box(left, x, y - k - 8, k, k, COLOURS["plain"], "Q = LᵀL\nσ₁(Q)", size=7)
    wide = 5 * (k + gap)
    left.set(xlim=(-10, wide), ylim=(-2 * (k + P + 2 * gap) + 50, P + 10), aspect="equal")
    per_pair = 2 * k**3
    left.set_title(
        f"pair by pair: {pairs} x LᵀL, {pairs * per_pair / 1e6:.0f} MFLOP, and as many σ₁"
    )
    height = (pairs + 1) * P
    box(right, 0, -height, k, height, PROMPT, f"all blocks' z\n{height} x {k}", size=8)
    box(right, k + gap, -k, k, k, LIVE, "L\nσ₁(L)", size=8)
    product = 2 * (pairs + 1) * P * k * k
    note(right, k + gap, -k - 40, f"V = |L z|² / σ₁²\n{product / 1e6:.0f} MFLOP for all z,\nno Q",
         va="top")  # fmt: skip
    right.set(xlim=(-10, 2 * k + 2 * gap + 60), ylim=(-height - 10, 20), aspect="equal")
    right.set_title("at once")
    return made


def _scene(side: int) -> torch.Tensor:
    """A picture with something at every frequency: a soft disc, stripes, a checkerboard."""
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, side, dtype=torch.float64),) * 2, indexing="ij")
    picture = torch.sigmoid(30 * (0.45 - ((x + 0.3) ** 2 + (y + 0.25) ** 2).sqrt()))
    picture = picture + 0.5 * (torch.sin(38 * (x + y)) > 0) * (x + y > 0.35)
    return picture + 0.35 * ((torch.sin(70 * x) * torch.sin(70 * y)) > 0) * ((x > 0.2) & (y < -0.2))


@drawing
def window_spectrum() -> Figure:
    """Fact 8: an image seen through one window of its spectrum, as two thin products."""
    side, w, origin = 128, 16, (64, 64 + 4)
    image = _scene(side)
    spectrum = torch.fft.fft2(image)
    origins = torch.tensor([origin])
    seen = shortcut_images(spectrum[None, None], origins, w, (side, side))[0, 0, 0]
    # x = Re A S B: columns of the inverse transform that belong to the window's frequencies
    places = torch.arange(side, dtype=torch.float64)
    rows, columns = (torch.arange(o, o + w) - side // 2 for o in origin)
    A = torch.exp(2j * torch.pi * places[:, None] * rows.double() / side) / side
    B = torch.exp(2j * torch.pi * columns.double()[:, None] * places / side) / side
    S = spectrum[rows % side][:, columns % side]
    difference = (seen - (A @ S @ B).real).abs().max() / seen.abs().max()
    made, axes = blank(8.2, 2.5, 4, width_ratios=[1, 1, 1.3, 1])
    axes[0].imshow(image.numpy(), cmap="gray", interpolation="nearest")
    axes[0].set_title("x")
    power = torch.fft.fftshift(spectrum).abs().add(1e-3).log()
    axes[1].imshow(power.numpy(), cmap="gray", interpolation="nearest")
    corner = (origin[1] - 0.5, origin[0] - 0.5)
    axes[1].add_patch(Rectangle(corner, w, w, fill=False, edgecolor=PROMPT, linewidth=1.6))
    axes[1].set_title(f"F x, window of {w} x {w}")
    parts, ax = axes[2], axes[2]
    parts.imshow(A.real.numpy(), extent=(0, w, 0, side), cmap="gray", interpolation="nearest")
    middle = (side - w) / 2
    box(ax, 2 * w, middle, w, w, PROMPT, "S", size=6.5)
    parts.imshow(B.real.numpy(), extent=(4 * w, 4 * w + side, middle, middle + w), cmap="gray",
                 interpolation="nearest")  # fmt: skip
    note(ax, -6, -16, f"A  {side} x {w}", fontsize=7.5)
    note(ax, 4 * w + side / 2, middle - 16, f"B  {w} x {side}", ha="center", fontsize=7.5)
    parts.set(xlim=(-8, 4 * w + side + 4), ylim=(-28, side + 4), aspect="equal")
    parts.set_title("two thin products")
    axes[3].imshow(seen.numpy(), cmap="gray", interpolation="nearest")
    axes[3].set_title("Re A S B")
    full, thin = 2 * side**3 * 2, 2 * (side * w * w + side * w * side)
    made.supxlabel(
        f"{thin / full:.1%} of the work of two full products. The library's result differs by less "
        f"than {bound(difference.item())}, relative, in fp64",
        fontsize=8.5,
    )
    return made


@drawing
def gauge() -> Figure:
    """Fact 9: all deep prompts times s: what the network sees of it, and what KLD sees."""
    vit = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=4, num_classes=10
    )
    kld = pae.KLD(dim=16)
    model = pae.PromptedViT(vit, pae.prompts.VPTDeep(8), kld).double().eval()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    tokens = model.prompts.tokens.detach().normal_().clone()

    @torch.no_grad()
    def at(s: float) -> tuple[torch.Tensor, float]:
        model.prompts.set_prompts(list(s * tokens))
        return pae.fast_forward(model, images), kld.terms(model.prompts.raw_prompts())[0].item()

    logits, consistency = at(1.0)
    factors = torch.logspace(-6, 3, 72).tolist()
    walked = [at(s) for s in factors]
    moved = [rounded(((out - logits).norm() / logits.norm()).item()) for out, _ in walked]
    made, ax = figure(8.2, 2.9)
    ax.loglog(factors, [rounded(c / consistency) for _, c in walked], color=PROMPT,
              label="KLD's consistency term, relative to s = 1")  # fmt: skip
    ax.loglog(factors, moved, color=LIVE, label="change of the logits")
    eps = vit.blocks[0].norm1.eps
    edge = math.sqrt(eps / tokens.var(-1, unbiased=False).mean().item())
    ax.axvspan(factors[0], edge, color=DEAD, alpha=0.6, linewidth=0)
    ax.text(factors[0] * 1.3, 1e5, "variance below eps:\nhere eps decides", fontsize=8, va="top")
    ax.set(xlabel="s, the factor of all prompts", xlim=(factors[0], factors[-1]), ylim=(1e-13, 1e7))
    ax.legend(loc="lower right")
    return made


@drawing
def absorbed() -> Figure:
    """Fact 10: what the last block forms, to scale, and which scores block 0 sends back."""
    s = VIT_B
    made, (left, right) = blank(8.2, 2.9, 2, width_ratios=[2.1, 1])
    rows = s.N + s.P
    box(left, 0, 0, s.D, rows, DEAD, f"K  {rows} x {s.D}", dead=True)
    box(left, s.D + 60, 0, s.D, rows, DEAD, f"V  {rows} x {s.D}", dead=True)
    for x, name in ((0, "W_kᵀ q"), (s.D + 60, "weights x rows")):
        box(left, x, -110, s.D, 3 * s.H, LIVE)
        note(left, x, -138, f"{name}   {s.H} x {s.D}, drawn 3 x as high", fontsize=7.5)
    left.set(xlim=(-20, 2 * s.D + 80), ylim=(-165, rows + 15), aspect="equal")
    share = s.H / rows
    left.set_title(f"Last block, one image: {share:.0%} of the rows stand for K and V")
    _scores(right, 17, 5, lambda i, j: i >= 5 and j < 5)
    right.set_title(f"Block 0, backward:\n{s.P} of {rows} score columns")
    return made


@drawing
def dropout_scope() -> Figure:
    """Fact 11: the masks that a training forward really draws, for four images."""
    P, D, batch = 8, 32, 4
    made, axes = blank(8.2, 1.75, 2)
    shape = pae.prompts.BackboneShape(
        depth=1, width=D, num_heads=1, patch_size=(8, 8), in_chans=3, num_tokens=17,
        num_prefix_tokens=1, grid=(4, 4), head_width=D, has_class_token=True,
    )  # fmt: skip
    for ax, scope in zip(axes, ("batch", "sample")):
        family = pae.prompts.VPTDeep(P, dropout=0.3, dropout_scope=scope)
        family.bind(shape)
        drawn = family.train().block_prompts(0, torch.zeros(batch, 17, D)).detach()
        masks = (drawn != 0).double().view(-1, P, D)
        for b in range(batch):
            own = len(masks) > 1 or b == 0
            x, y = (b % 2) * (D + 4), -(b // 2) * (P + 4)
            if own:
                ax.imshow(
                    masks[b].numpy(), extent=(x, x + D, y, y + P), cmap="Blues", vmin=0, vmax=1.3
                )
            look = {"fill": not own, "facecolor": "#F4F4F4", "edgecolor": "#999999"}
            ax.add_patch(Rectangle((x, y), D, P, linewidth=0.7, **look))
            if not own:
                note(ax, x + D / 2, y + P / 2, "the same", ha="center", color="#777777")
        ax.set(xlim=(-1, 2 * D + 5), ylim=(-P - 6, P + 2), aspect="equal")
        size = "(P, D): keys and values once" if scope == "batch" else "(B, P, D): B times"
        ax.set_title(f'dropout_scope="{scope}", {size}')
    return made


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m docs.drawings", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(DRAWINGS)}")
    parser.add_argument("--output", type=Path, default=FIGURES, metavar="FOLDER")
    given = parser.parse_args(arguments)
    for name in given.names or DRAWINGS:
        for path in save(DRAWINGS[name](), given.output / name):
            print(path)


if __name__ == "__main__":
    main()
