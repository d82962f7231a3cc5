"""LSPT: prompts live through the blocks and remember, slot by slot, what they were before.

Source: Mo et al., "LSPT: Long-term Spatial Prompt Tuning for Visual Representation Learning" (arXiv
2402.17406). No code and no equations are public: everything here is a reconstruction.
"""

from __future__ import annotations

from torch import Tensor, nn

from .base import BackboneShape, PromptFamily, check_choice
from .registry import register
from .vpt import VPTShallow

MEMORIES = ("replace", "add")


@register("lspt")
class LSPT(VPTShallow):
    """h_l, c_l = LSTM(o_l + mean_j x_l[j], (h_{l-1}, c_{l-1})); h_l enters block l, l = 1 .. .

    o_l (B, P, D) are block l - 1's output rows of the prompts and x_l its patch rows: the class-
    aware spatial coding adds the image's mean patch to every prompt; the long-term coding is one
    LSTM, shared by all blocks, along the depth of each prompt slot. Block 0 reads the learned
    tokens; the LSTM's first state is zero.

    Reconstructed from the abstract and from what reviews quote of the method: where the mean is
    taken, that the LSTM's output is the prompt itself (`memory="replace"`) rather than added to
    o_l (`memory="add"`), and that its states start at zero.

    Every prompt row is live, so nothing can be skipped but what no head reads in the last block.

    Args:
        num_tokens: P.
        hidden: width of the LSTM; None is D, else a linear map leads back to D. The published
            cost (4 to 5 times VPT's parameters) fits D.
        memory: "replace" or "add".
        dropout, dropout_scope: of the learned tokens, as in `VPTDeep`.

    Attributes:
        tokens: (P, D). cell: `nn.LSTMCell(D, hidden)`. back: `nn.Linear(hidden, D)` or None.

    KLD does not apply (only block 0 has prompts of its own), nor does MPA.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what was expected.
    """

    def __init__(
        self,
        num_tokens: int,
        hidden: int | None = None,
        memory: str = "replace",
        dropout: float = 0.0,
        dropout_scope: str = "batch",
    ) -> None:
        super().__init__(num_tokens, dropout, dropout_scope)
        if hidden is not None and (isinstance(hidden, bool) or not isinstance(hidden, int)):
            raise TypeError(f"hidden must be an integer or None, got {hidden!r}")
        if hidden is not None and hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden}")
        self.hidden = hidden
        self.memory = check_choice("memory", memory, MEMORIES)
        self.back: nn.Linear | None = None

    def bind(self, shape: BackboneShape) -> None:
        super().bind(shape)
        hidden = self.hidden or shape.width
        self.cell = nn.LSTMCell(shape.width, hidden)
        if hidden != shape.width:
            self.back = nn.Linear(hidden, shape.width)

    def next_rows(self, index: int, rows: Tensor, x: Tensor) -> Tensor:
        batch, count, width = rows.shape
        spatial = rows + x[:, self.shape.num_prefix_tokens :].mean(dim=1, keepdim=True)
        # one sequence per image and slot; it starts anew with every forward
        states = self.this_forward.pop("states", None)
        dtype = self.cell.weight_ih.dtype
        h, c = self.cell(spatial.reshape(batch * count, width).to(dtype), states)
        if index + 1 < self.shape.depth:
            self.this_forward["states"] = h, c
        out = (h if self.back is None else self.back(h)).view(batch, count, width).to(rows.dtype)
        return rows + out if self.memory == "add" else out

    # the LSTM makes the prompts of all blocks but the first
    set_prompts = PromptFamily.set_prompts
