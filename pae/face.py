"""What `import pae` gives, imported when it is first asked for; see `pae.__getattr__`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import analysis, prompts
from .checkpoint import Checkpoint
from .checkpoint import read as read_checkpoint
from .clip import PromptedCLIP, PromptedText, prompted_clip
from .dense import SETRPUP, LinearHead, PromptedSegmenter
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

if TYPE_CHECKING:
    from .train.callbacks import Callback
    from .train.fit import Run, fit
    from .train.hub import from_pretrained, push_to_hub
    from .train.using import load, serve_many

# names whose modules bring the command line's libraries along, so they wait until they are asked
_LATER = {
    "Callback": "pae.train.callbacks",
    "Run": "pae.train.fit",
    "fit": "pae.train.fit",
    "from_pretrained": "pae.train.hub",
    "load": "pae.train.using",
    "push_to_hub": "pae.train.hub",
    "serve_many": "pae.train.using",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'pae.face' has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)


__all__ = [
    "KLD",
    "SETRPUP",
    "Callback",
    "Checkpoint",
    "CheckpointError",
    "LinearHead",
    "MPAResult",
    "NullSpace",
    "OfficialParts",
    "PromptedCLIP",
    "PromptedSegmenter",
    "PromptedText",
    "PromptedViT",
    "Run",
    "TaskInfo",
    "UnsupportedBackbone",
    "__version__",
    "adopt",
    "analysis",
    "condense",
    "fast_forward",
    "fit",
    "from_pretrained",
    "graphed_step",
    "load",
    "load_official",
    "mpa_init",
    "prompted_clip",
    "prompts",
    "push_to_hub",
    "read_checkpoint",
    "serve_many",
    "spt_init",
    "whiten_init",
]
