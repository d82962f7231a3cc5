"""The two errors of pae that are more than a wrong value, and how the others are told."""


class UnsupportedBackbone(ValueError):
    """The backbone computes something that the folded plan cannot express; the message names the
    attribute.
    """


class CheckpointError(RuntimeError):
    """A checkpoint is unreadable, incomplete, or belongs to another backbone or model."""


def one_line(error: BaseException) -> str:
    """What `error` says, on one line; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
