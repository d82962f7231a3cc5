"""Modal Pre-Alignment: prompts that start at the frequencies the frozen network leans on.

Phase I ranks windows of the spectrum by the loss of the batch that keeps only that window, with all
prompts zero. Phase II turns the best P of them into P prompts: the energy-weighted mean of the stem
tokens of the filtered batch; deep prompts then travel alone through the frozen blocks.

What is not computed, although the reference does: a transform per window (one for the batch), the
filtered images (patch tokens come straight from the spectrum), P equal prompts (one key with
+ log P), their queries, the rows nobody reads in the last block, KLD. What need not be computed
either: losses that cannot change the selection (`search`), or all digits of them (`precision`).

    alignment   `mpa_init`: both phases
    incoming    the batch and the model, checked; what must stay as it was
    losses      filtered batches packed into forwards, over devices and ranks
    forward     logits with zero prompts, forward only
    search      every window on every image, or successive halving
    near_ties   the exact selection from rounded losses
    probe       a head fitted in closed form
    ranks       the processes that share a search

Source: "Visual Prompt-Agnostic Evolution" (arXiv 2601.20232), Sec. 2.2, Eq. 2-4.
"""

from .alignment import MPAResult, mpa_init
from .near_ties import NearTies
from .probe import fit_probe
from .search import Halving

__all__ = ["Halving", "MPAResult", "NearTies", "fit_probe", "mpa_init"]
