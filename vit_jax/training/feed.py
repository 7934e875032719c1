"""Reads batches and places them on the devices ahead of the step that needs them."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from vit_jax.types import Array, HostBatch

_POLL_SECONDS = 0.1


class Feedable(Protocol):
    """Batches in host memory, such as `vit_jax.data.Batches`."""

    def __iter__(self) -> Iterator[HostBatch]: ...

    @property
    def num_bad_images(self) -> int: ...

    def close(self) -> None: ...


class DeviceFeed:
    """Reads and places batches on its own thread, up to `depth` batches ahead.

    Args:
      batches: this process's rows of each batch, in host memory.
      place: puts a batch on the devices.

    Attributes:
      waited: the seconds for which `next_batch` waited so far.
    """

    def __init__(
        self, batches: Feedable, place: Callable[[HostBatch], dict[str, Array]], depth: int
    ):
        self.waited = 0.0
        self._batches = batches
        self._place = place
        self._ready: queue.Queue = queue.Queue(maxsize=max(1, depth))
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="vit-feed", daemon=True)
        self._thread.start()

    def next_batch(self) -> dict[str, Array]:
        """Returns the next batch, on the devices, or raises the error of the pipeline."""
        started = time.monotonic()
        batch = self._ready.get()
        self.waited += time.monotonic() - started
        if isinstance(batch, BaseException):
            raise batch
        return batch

    @property
    def num_bad_images(self) -> int:
        """Returns the number of unreadable images that other images have replaced so far."""
        return self._batches.num_bad_images

    def close(self) -> None:
        """Stops the thread and the pipeline behind it."""
        self._closing.set()
        self._thread.join(timeout=5.0)
        self._batches.close()

    def __enter__(self) -> "DeviceFeed":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fill(self) -> None:
        try:
            for batch in self._batches:
                if not self._put(self._place(batch)):
                    return
        except BaseException as error:  # It is raised by the thread that waits for this batch.
            self._put(error)

    def _put(self, item: dict[str, Array] | BaseException) -> bool:
        while not self._closing.is_set():
            try:
                self._ready.put(item, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False
