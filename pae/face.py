"""What `import pae` gives, imported when it is first asked for; see `pae.__getattr__`."""

from . import analysis, prompts
from .errors import CheckpointError, UnsupportedBackbone
from .graphs import graphed_step
from .kld import KLD
from .methods.condensation import condense
from .methods.nsp2 import NullSpace
from .methods.official import OfficialParts, load_official
from .methods.spt import spt_init
from .methods.whitening import whiten_init
from .model import PromptedViT, fast_forward
from .mpa import MPAResult, mpa_init
from .version import __version__

__all__ = [
    "KLD",
    "CheckpointError",
    "MPAResult",
    "NullSpace",
    "OfficialParts",
    "PromptedViT",
    "UnsupportedBackbone",
    "__version__",
    "analysis",
    "condense",
    "fast_forward",
    "graphed_step",
    "load_official",
    "mpa_init",
    "prompts",
    "spt_init",
    "whiten_init",
]
