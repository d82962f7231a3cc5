"""The file of a training state: everything that a run needs to go on, with its own digest.

    pae-state-1 <SHA-256 of the rest, hexadecimal>
    <what torch.save makes of the state>

The digest is looked at before anything is believed, and the rest is read without running code.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from pae.errors import CheckpointError, one_line
from pae.files import write_atomically

_MAGIC = b"pae-state-1"
_HEAD = len(_MAGIC) + 1 + 2 * hashlib.sha256().digest_size + 1


def write_state(path: Path, state: dict[str, Any], previous: Path | None) -> None:
    """Replaces `path`; the file that it replaces is called `previous` from then on, or, without
    such a name, is gone.

    At every instant one of the two is a complete state.

    Raises:
        OSError: naming `path`.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    head = _MAGIC + b" " + hashlib.sha256(payload).hexdigest().encode() + b"\n"

    def write(file: Path) -> None:
        with file.open("wb") as opened:
            opened.write(head)
            opened.write(payload)

    write_atomically(path, write, previous)


def read_state(path: Path, advice: str = "") -> dict[str, Any]:
    """The state that `write_state` put into `path`, its tensors on the CPU.

    Args:
        advice: what a message about a damaged file ends with.
    Raises:
        CheckpointError: missing, unreadable, half-written, damaged, or not a state.
    """
    try:
        if not path.is_file():  # a pipe, say, would be waited for
            raise CheckpointError(f"{path}: expected a state file, found none{advice}")
        with path.open("rb") as file:
            head = file.read(_HEAD)
            # of a file that is something else, which may be of any size, no more is read
            payload = file.read() if head.startswith(_MAGIC + b" ") else b""
    except (OSError, MemoryError) as error:
        raise CheckpointError(f"{path} cannot be read: {one_line(error)}{advice}") from error
    if head != _MAGIC + b" " + hashlib.sha256(payload).hexdigest().encode() + b"\n":
        raise CheckpointError(f"{path} is half-written or damaged{advice}")
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # the digest is right: another version wrote it, or somebody else
        raise CheckpointError(
            f"{path} holds something else than the state of a run ({type(error).__name__})"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not the state of a run")
    return state
