"""Runs a function of the step number ahead of the caller, on threads, keeping the order."""

import collections
import logging
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, wait
from typing import Any, NamedTuple

from vit_jax.errors import UserError

_COMPLAIN_EVERY_S = 30.0
_LOOK_EVERY_S = 0.2

logger = logging.getLogger(__name__)


class Workers(NamedTuple):
    """The amount of parallel work, and the longest time without a batch."""

    num_threads: int
    prefetch: int
    """Batches made ahead; 0 makes each in the caller's thread, when it is asked for."""
    timeout_s: float


def default_threads() -> int:
    """Returns the number of threads: one for each core that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Absent on macOS.
    return len(affinity(0)) if affinity else os.cpu_count() or 1


class OrderedPrefetcher:
    """Iterates over `load(step)` for the given steps, some of them computed ahead.

    Threads are daemons, because a read that never returns must not keep a finished process alive.
    An error raised by `load` is raised at its own place in the order.
    """

    def __init__(
        self,
        load: Callable[[int], Any],
        steps: Iterator[int],
        workers: Workers,
        name: str,
    ):
        self._load = load
        self._steps = steps
        self._depth = workers.prefetch
        self._timeout_s = workers.timeout_s
        self._name = name
        self._ahead: collections.deque[tuple[int, Future]] = collections.deque()
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        num_threads = min(workers.num_threads, workers.prefetch)
        self._threads = [
            threading.Thread(target=_work, args=(self._tasks, load), daemon=True, name="vit-data")
            for _ in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()
        # The threads hold the queue, not this object, so that dropping it stops them too.
        self._stop = weakref.finalize(self, _stop_threads, self._tasks, num_threads)

    def __iter__(self) -> "OrderedPrefetcher":
        return self

    def __next__(self) -> Any:
        if not self._stop.alive:
            raise StopIteration
        if not self._threads:
            return self._load(next(self._steps))
        self._submit()
        if not self._ahead:
            raise StopIteration
        result = self._wait(*self._ahead.popleft())
        self._submit()
        return result

    def close(self) -> None:
        """Stops the threads; those in the middle of a read are given a second to come back."""
        for _, future in self._ahead:
            future.cancel()
        self._ahead.clear()
        self._stop()
        for thread in self._threads:
            thread.join(timeout=1.0)

    def _submit(self) -> None:
        while len(self._ahead) < self._depth:
            step = next(self._steps, None)
            if step is None:
                return
            future: Future = Future()
            self._ahead.append((step, future))
            self._tasks.put((step, future))

    def _wait(self, step: int, future: Future) -> Any:
        """The batch of `step`, once it is there. Looks up now and then to complain or to stop."""
        started = time.monotonic()
        complain_after_s = _COMPLAIN_EVERY_S
        while self._stop.alive:
            patience_s = self._timeout_s - (time.monotonic() - started)
            done, _ = wait([future], timeout=max(0.0, min(_LOOK_EVERY_S, patience_s)))
            if done:
                try:
                    return future.result()
                except CancelledError:
                    break
            waited_s = time.monotonic() - started
            if waited_s >= self._timeout_s:
                raise UserError(
                    f"{self._name} delivered nothing for {waited_s:.0f} s (batch {step}): "
                    "is its storage reachable?"
                )
            if waited_s >= complain_after_s:
                logger.warning("waiting for %s since %.0f s (batch %d)", self._name, waited_s, step)
                complain_after_s += _COMPLAIN_EVERY_S
        raise StopIteration


def _work(tasks: queue.SimpleQueue, load: Callable[[int], Any]) -> None:
    while (task := tasks.get()) is not None:
        step, future = task
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(load(step))
            except BaseException as error:  # Handed to the thread that waits for this step.
                future.set_exception(error)


def _stop_threads(tasks: queue.SimpleQueue, num_threads: int) -> None:
    for _ in range(num_threads):
        tasks.put(None)
