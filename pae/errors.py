"""The two errors of pae that are more than a wrong value."""


class UnsupportedBackbone(ValueError):
    """The backbone computes something that the folded plan cannot express; the message names the
    attribute.
    """


class CheckpointError(RuntimeError):
    """A checkpoint is unreadable, incomplete, or belongs to another backbone or model."""
