"""pae: prompt-tune a frozen vision transformer, fast and exactly."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .face import *  # noqa: F403 (it lists its names)
    from .face import __all__ as __all__

    # of `face._LATER`, for those who read without running
    from .train.callbacks import Callback as Callback
    from .train.fit import Run as Run
    from .train.fit import fit as fit
    from .train.hub import from_pretrained as from_pretrained
    from .train.hub import push_to_hub as push_to_hub
    from .train.using import load as load
    from .train.using import serve_many as serve_many


def __getattr__(name: str) -> Any:
    """A public name or a module, imported when it is first asked for.

    So the command line answers --help, and a typing error, before torch is there.
    """
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module 'pae' has no attribute {name!r}")
    if find_spec(f"pae.{name}") is not None:
        return import_module(f"pae.{name}")
    face = import_module("pae.face")
    if name != "__all__" and name not in face.__all__:
        raise AttributeError(f"module 'pae' has no attribute {name!r}")
    value = globals()[name] = getattr(face, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *import_module("pae.face").__all__})
