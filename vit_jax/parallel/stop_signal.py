"""SIGTERM and Ctrl-C, which stop a run after the current step."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """Notes SIGTERM and Ctrl-C within its `with` block, instead of ending the process.

    A second Ctrl-C ends the process at once. Any of several processes may receive the signal: JAX
    listens for SIGTERM in each of them, and all stop after the same step.
    """

    def __init__(self) -> None:
        self._received: str | None = None
        self._previous: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> "StopSignal":
        is_alone = jax.process_count() == 1  # Otherwise SIGTERM must still reach JAX.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM) if is_alone else (signal.SIGINT,):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self._received == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = signal.Signals(number).name
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    @property
    def name(self) -> str:
        """Returns the name of the signal, as far as this process knows it."""
        return self._received or "a signal"

    def asked(self) -> bool:
        """Returns whether this process has received a signal."""
        return self._received is not None

    def agreed(self, step: int) -> bool:
        """Returns whether all processes stop after `step`; all must call this at every step."""
        if jax.process_count() == 1:
            return self.asked()
        return multihost_utils.reached_preemption_sync_point(step)
