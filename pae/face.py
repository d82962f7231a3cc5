"""What `import pae` gives, imported when it is first asked for; see `pae.__getattr__`."""

from . import analysis, prompts
from .checkpoint import Checkpoint
from .checkpoint import read as read_checkpoint
from .errors import CheckpointError, UnsupportedBackbone
from .graphs import graphed_step
from .kld import KLD
from .methods.adopted import adopt
from .methods.condensation import condense
from .methods.nsp2 import NullSpace
from .methods.official import OfficialParts, load_official
from .methods.spt import spt_init
from .methods.whitening import whiten_init
from .model import PromptedViT, fast_forward
from .mpa import MPAResult, mpa_init
from .task import TaskInfo
from .version import __version__

__all__ = [
    "KLD",
    "Checkpoint",
    "CheckpointError",
    "MPAResult",
    "NullSpace",
    "OfficialParts",
    "PromptedViT",
    "TaskInfo",
    "UnsupportedBackbone",
    "__version__",
    "adopt",
    "analysis",
    "condense",
    "fast_forward",
    "graphed_step",
    "load_official",
    "mpa_init",
    "prompts",
    "read_checkpoint",
    "spt_init",
    "whiten_init",
]
