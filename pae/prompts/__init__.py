"""Prompt families, one file each. One line here makes a new one known."""

from .approximated import ApproximatedContext as ApproximatedContext
from .approximated import ApproximatedPair as ApproximatedPair
from .approximated import ApproximatedPrompts as ApproximatedPrompts
from .approximated import Approximation as Approximation
from .apt import APT as APT
from .base import BackboneShape as BackboneShape
from .base import PromptFamily as PromptFamily
from .bpt import BPTDeep as BPTDeep
from .bpt import BPTShallow as BPTShallow
from .da_vpt import DAVPT as DAVPT
from .dapt import DAPT as DAPT
from .e2vpt import E2VPT as E2VPT
from .e2vpt import E2VPTImportance as E2VPTImportance
from .e2vpt import e2vpt_importance as e2vpt_importance
from .ivpt import IVPT as IVPT
from .lspt import LSPT as LSPT
from .pro_vpt import ProVPT as ProVPT
from .registry import METHODS as METHODS
from .registry import PAIRS as PAIRS
from .registry import build as build
from .registry import register as register
from .registry import register_pair as register_pair
from .text_context import Context as Context
from .text_context import CoOp as CoOp
from .text_context import Pair as Pair
from .text_context import TextContext as TextContext
from .upt import UPT as UPT
from .upt import UPTDeep as UPTDeep
from .vapt import VAPT as VAPT
from .vfpt import VFPTDeep as VFPTDeep
from .vfpt import VFPTShallow as VFPTShallow
from .vpt import VPTDeep as VPTDeep
from .vpt import VPTShallow as VPTShallow

__all__ = [
    "ApproximatedContext",
    "Approximation",
    "METHODS",
    "PAIRS",
    "BackboneShape",
    "Context",
    "E2VPTImportance",
    "Pair",
    "PromptFamily",
    "TextContext",
    "build",
    "e2vpt_importance",
    "register",
    "register_pair",
    *(pair.__name__ for pair in PAIRS.values()),
    *(family.__name__ for family in METHODS.values()),
]
