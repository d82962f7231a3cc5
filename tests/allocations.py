"""Memory of a device that is not there, as PyTorch's allocator would count it."""

from __future__ import annotations

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class Memory:
    """Which storages are on the device, and how many bytes they hold and held at most."""

    def __init__(self) -> None:
        # as long as a weak reference to it is held, no other storage has this address
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}
        self._open: dict[int, StorageWeakRef] = {}
        self.now = self.most = 0

    def holds(self, t: Tensor) -> bool:
        try:
            return t.untyped_storage()._cdata in self._held
        except NotImplementedError:  # a fake tensor has none
            return False

    def take(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key = storage._cdata
        if key not in self._held:
            self._held[key] = StorageWeakRef(storage), storage.nbytes()
            self.now += storage.nbytes()
            if self.now > self.most:
                self.sweep()  # what has gone meanwhile was not there any more
                self.most = max(self.most, self.now)

    def leave_open(self, t: Tensor) -> None:
        """It is wherever the tensors are that it meets."""
        storage = t.untyped_storage()
        self._open[storage._cdata] = StorageWeakRef(storage)

    def is_open(self, t: Tensor) -> bool:
        return t.untyped_storage()._cdata in self._open

    def sweep(self) -> None:
        for key in [k for k, (ref, _) in self._held.items() if ref.expired()]:
            self.now -= self._held.pop(key)[1]
        for key in [k for k, ref in self._open.items() if ref.expired()]:
            del self._open[key]

    def swept(self) -> int:
        """Bytes held now."""
        self.sweep()
        return self.now

    def reset(self) -> None:
        """From here on `most` is of what comes."""
        self.most = self.swept()
