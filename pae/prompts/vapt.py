"""Visual adaptive prompt tuning: prompts that are functions of the image.

The first `static_blocks` blocks read free prompts, as in VPT. Every later block i makes its own
from the patch rows X (n, D) that enter it:

    C   = F_i * LN_i(X)                LN with eps 1e-5; F_i one K x K kernel over the patch grid,
                                       the same for all channels
    G   = A_i dropout2d(C) + b_i       A_i (P, n'), b_i (P,) added to all channels
    P_i = G + c W2 dropout(act(W1 G))  W1 (r, D), W2 (D, r), shared by all blocks

Only LN's statistics are non-linear, so with W = A_i T(F_i), T the Toeplitz matrix of the kernel,

    G = ((W xhat) gamma + (W 1) beta^T) m + b_i,      m the dropped channels, (B, 1, D),

which is what runs: no convolution, no LN output, one product with a (P, n) matrix that is made of
parameters alone (`pae_kernels.adaptive`).

Initialisation: A = b = 0, so all adaptive prompts start as exact zeros (with an activation that
keeps 0) and only A and b get a gradient in the first step; F ~ N(0, 1); W1, W2 as PyTorch's Linear.
Zero rows make LN1's eps decide: the frozen norm of prompt rows runs in fp32 with the exact eps.

Defaults are those of the released code: K = 2, r = 8, ReLU, both dropouts 0.1, block 0 static.
Where it and the paper differ we follow the code: a residual around the MLP, a bias of the token
projection, a trained LayerNorm, channel dropout, a static first block (`static_blocks=0` is the
paper's count). Where we differ from the code: prompt dropout is 0 unless asked for; the grid is the
backbone's (the code has 14 x 14 built in); class and register rows are not normalised in vain.

Prompts cannot be set from outside, so Modal Pre-Alignment refuses this family. A regulariser sees
the mean of the last batch's prompts, see `VAPT.raw_prompts`.

Source: "Revisit Visual Prompt Tuning: The Expressiveness of Prompt Experts" (arXiv 2501.18936).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pae_kernels.adaptive import prompt_bottleneck, token_mix
from pae_kernels.adaptive.reference import ACTIVATIONS

from .base import BackboneShape, check_choice, check_count, check_flag, check_probability
from .registry import register
from .vpt import _VPT

_EPS = 1e-5


@register("vapt")
class VAPT(_VPT):
    """VAPT: per-sample prompts from a mixture of patch rows and a bottleneck MLP.

    Args:
        num_tokens: prompts P per block.
        kernel: side K of the convolution; 0 mixes the patch rows as they are.
        padding: of the convolution; n' = (rows - K + 1 + 2 padding) (columns - K + 1 + 2 padding).
        hidden: width r of the bottleneck; 0 leaves it out.
        activation: "relu", "gelu" (exact), "sigmoid" or "softmax" (over r).
        static_blocks: how many blocks, from the first on, have free prompts instead.
        kernel_per_channel: D kernels per block instead of one (costs K^2 times the product).
        share_bottleneck: one W1, W2 for all blocks, or one pair per block.
        learn_scale: whether c is trained; otherwise it is 1.
        channel_dropout: probability with which a channel of an image is zeroed behind the
            convolution.
        hidden_dropout: probability behind the activation.
        dropout, dropout_scope: of the static prompts, as in `VPTDeep`.

    Attributes:
        tokens: (static_blocks, P, D).
        mixers: one `_Mixer` per adaptive block. bottlenecks: one `_Bottleneck`, or one per block.

    Raises:
        ValueError, TypeError: on a value outside its range; at `bind` on a kernel larger than the
            padded patch grid, or more static blocks than the backbone has blocks.

    Source: arXiv 2501.18936, formulas of the released code.
    """

    depends_on_input = True
    training_arguments = (*_VPT.training_arguments, "channel_dropout", "hidden_dropout")

    def __init__(
        self,
        num_tokens: int = 5,
        kernel: int = 2,
        padding: int = 0,
        hidden: int = 8,
        activation: str = "relu",
        static_blocks: int = 1,
        kernel_per_channel: bool = False,
        share_bottleneck: bool = True,
        learn_scale: bool = False,
        channel_dropout: float = 0.1,
        hidden_dropout: float = 0.1,
        dropout: float = 0.0,
        dropout_scope: str = "batch",
    ) -> None:
        super().__init__(dropout, dropout_scope)
        self.num_tokens = check_count("num_tokens", num_tokens)
        if num_tokens == 0:
            raise ValueError("num_tokens must be at least 1, got 0")
        self.kernel = check_count("kernel", kernel)
        self.padding = check_count("padding", padding)
        if padding >= max(kernel, 1):
            raise ValueError(f"padding must be smaller than kernel, {kernel}, got {padding}")
        self.hidden = check_count("hidden", hidden)
        self.activation = check_choice("activation", activation, sorted(ACTIVATIONS))
        self.static_blocks = check_count("static_blocks", static_blocks)
        self.kernel_per_channel = check_flag("kernel_per_channel", kernel_per_channel)
        self.share_bottleneck = check_flag("share_bottleneck", share_bottleneck)
        self.learn_scale = check_flag("learn_scale", learn_scale)
        self.channel_dropout = check_probability("channel_dropout", channel_dropout)
        self.hidden_dropout = check_probability("hidden_dropout", hidden_dropout)

    def bind(self, shape: BackboneShape) -> None:
        if self.static_blocks > shape.depth:
            raise ValueError(
                f"static_blocks must be at most the backbone's {shape.depth} blocks, "
                f"got {self.static_blocks}"
            )
        if len(shape.grid) != 2:
            grid = " x ".join(map(str, shape.grid))
            raise ValueError(
                f"prompts (VAPT) convolves a grid of patches, and the backbone's are {grid} tubes "
                "of a clip: use APT or VPTDeep"
            )
        largest = min(shape.grid) + 2 * self.padding
        if self.kernel > largest:
            raise ValueError(
                f"kernel must be at most {largest} on a {shape.grid[0]} x {shape.grid[1]} grid "
                f"padded by {self.padding}, got {self.kernel}"
            )
        self._allocate(shape, self.static_blocks, self.num_tokens)
        adaptive = shape.depth - self.static_blocks
        self.mixers = nn.ModuleList(
            _Mixer(shape, self.num_tokens, self.kernel, self.padding, self.kernel_per_channel)
            for _ in range(adaptive)
        )
        pairs = min(adaptive, 1) if self.share_bottleneck else adaptive
        self.bottlenecks = nn.ModuleList(
            _Bottleneck(shape.width, self.hidden, self.learn_scale) for _ in range(pairs)
        )

    @property
    def prompt_counts(self) -> list[int]:
        return [self.num_tokens] * self.shape.depth

    def block_prompts(self, index: int, x: Tensor) -> Tensor:
        """(P, D) in static blocks; (B, P, D) of the rows `x` (B, N, D) in the others.

        Raises:
            ValueError: x holds another number of rows than the backbone's own image size gives.
        """
        if index < self.static_blocks:
            return self._drop(self.tokens[index], x)
        number = index - self.static_blocks
        u, shift = self.mixers[number](x)
        channels = self._mask(self.channel_dropout, u, len(u), u.shape[-1])
        units = self._mask(self.hidden_dropout, u, len(u), self.num_tokens, self.hidden)
        prompts = self._finish(number, u, shift, channels, units)
        # what `raw_prompts` needs: with a graph the mixed rows, which the backward keeps anyway;
        # without one the mean, since nothing else would keep them
        if u.requires_grad:
            self.this_forward["mixed", number] = u, shift
        else:
            self.note_graph()
            dropped = channels is not None or units is not None
            whole = self._finish(number, u, shift) if dropped else prompts
            self.this_forward["mixed", number] = whole.mean(0)
        return prompts

    def raw_prompts(self) -> list[Tensor | None]:
        """Per block (P, D): the static prompts, and the mean over the last batch of the adaptive
        ones, both without dropout.

        The mean is differentiable through the graph of that batch's forward: add what is made of it
        to that batch's loss and call backward once. Without gradients it is a constant.

        Raises:
            RuntimeError: no batch has been seen.
        """
        prompts: list[Tensor | None] = [*self.tokens.unbind(0)]
        for j in range(len(self.mixers)):
            mixed = self.this_forward.get(("mixed", j))
            if mixed is None:
                raise RuntimeError(
                    "VAPT makes its prompts from images: run a forward before asking for them"
                )
            own = mixed if isinstance(mixed, Tensor) else self._finish(j, *mixed).mean(0)
            prompts.append(own)
        return prompts

    def _finish(
        self,
        number: int,
        u: Tensor,
        shift: Tensor,
        channels: Tensor | None = None,
        units: Tensor | None = None,
    ) -> Tensor:
        """Prompts (B, P, D) of an adaptive block from what its mixer made."""
        mixer: _Mixer = self.mixers[number]  # type: ignore[assignment]
        pair: _Bottleneck = self.bottlenecks[0 if self.share_bottleneck else number]  # type: ignore[assignment]
        return prompt_bottleneck(
            u, mixer.gain, shift, mixer.bias, pair.down, pair.scaled_up(), self.activation,
            channel_mask=channels, hidden_mask=units,
        )  # fmt: skip

    def _mask(self, probability: float, like: Tensor, *size: int) -> Tensor | None:
        """Dropout as factors: 0, or 1 / (1 - probability)."""
        if not self.training or probability == 0.0:
            return None
        return F.dropout(like.new_ones(size), probability, training=True)


class _Mixer(nn.Module):
    """LayerNorm, convolution and token projection of one block.

    Attributes:
        gain, offset: (D,) of the LayerNorm.
        kernel: (K, K), or (D, K, K) per channel, or None.
        weight: (P, n'). bias: (P,).
    """

    def __init__(
        self, shape: BackboneShape, count: int, kernel: int, padding: int, per_channel: bool
    ) -> None:
        super().__init__()
        self.grid, self.prefix, self.padding = shape.grid, shape.num_prefix_tokens, padding
        self.side = kernel or 1
        shrink = self.side - 1 - 2 * padding
        places = (shape.grid[0] - shrink) * (shape.grid[1] - shrink)
        self.gain = nn.Parameter(torch.ones(shape.width))
        self.offset = nn.Parameter(torch.zeros(shape.width))
        size = (shape.width, kernel, kernel) if per_channel else (kernel, kernel)
        self.kernel = nn.Parameter(torch.randn(size)) if kernel else None
        self.weight = nn.Parameter(torch.zeros(count, places))
        self.bias = nn.Parameter(torch.zeros(count))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (B, N, D) -> their mixtures (B, P, D) before LayerNorm's affine part, and the
        mixtures (P, D) of LayerNorm's offset.
        """
        rows = self.grid[0] * self.grid[1] + self.prefix
        if x.shape[1] != rows:
            raise ValueError(
                f"images must have {self.grid[0]} x {self.grid[1]} patches for VAPT's token "
                f"projection, {rows} rows in all, got {x.shape[1]} rows"
            )
        folded = self._folded()
        # columns of zeros leave out class and register rows
        u = token_mix(x, F.pad(folded.flatten(0, 1), (self.prefix, 0)), _EPS)
        sums = folded.sum(-1, keepdim=True)  # (Q, P, 1)
        if self.kernel is None or self.kernel.dim() == 2:
            return u, sums[0] * self.offset
        taps = self.kernel.flatten(1).t().unsqueeze(1)  # (Q, 1, D)
        u = (u.unflatten(1, sums.shape[:2]) * taps).sum(1)
        return u, (sums * taps).sum(0) * self.offset

    def _folded(self) -> Tensor:
        """Token projection behind the convolution, (Q, P, n).

        Q = 1: A T(F) for one kernel. Per channel Q = K K, one per tap, which the kernels weight
        afterwards: taps act on rows, kernels on channels.
        """
        if self.kernel is None:
            return self.weight.unsqueeze(0)
        if self.kernel.dim() == 3:
            taps = torch.eye(self.side**2, dtype=self.weight.dtype, device=self.weight.device)
        else:
            taps = self.kernel.view(1, -1)
        # the adjoint of a convolution: every place spreads its weight over the patches it has read
        spread = (taps[:, None, :, None] * self.weight[:, None]).flatten(0, 1)  # (Q P, K K, n')
        rows = F.fold(spread, self.grid, self.side, padding=self.padding)  # (Q P, 1, H, W)
        return rows.view(len(taps), len(self.weight), -1)


class _Bottleneck(nn.Module):
    """W1 (r, D), W2 (D, r), and c () where it is trained."""

    def __init__(self, width: int, hidden: int, learn_scale: bool) -> None:
        super().__init__()
        self.down = nn.Parameter(_linear_init(hidden, width))
        self.up = nn.Parameter(_linear_init(width, hidden))
        self.scale = nn.Parameter(torch.ones(())) if learn_scale else None

    def scaled_up(self) -> Tensor:
        """c W2."""
        return self.up if self.scale is None else self.scale * self.up


def _linear_init(rows: int, columns: int) -> Tensor:
    """PyTorch's initialisation of a Linear's weight, U(+-1 / sqrt(columns))."""
    bound = max(columns, 1) ** -0.5
    return torch.empty(rows, columns).uniform_(-bound, bound)
