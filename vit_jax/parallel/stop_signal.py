"""SIGTERM and Ctrl-C, which ask a run to stop at a moment that suits it."""

import os
import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """Within the `with` block SIGTERM and Ctrl-C ask for a stop instead of ending the process.

    A second Ctrl-C ends it at once. Of several processes any may be told: JAX listens for SIGTERM
    in each since they met, and has all of them stop after the same step.
    """

    def __init__(self) -> None:
        self._received: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        is_alone = jax.process_count() == 1  # Else SIGTERM must go on reaching JAX.
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
        """The signal that arrived, as far as this process knows."""
        return self._received or "a signal"

    def asked(self) -> bool:
        """Whether this process was asked to stop."""
        return self._received is not None

    def agreed(self, step: int) -> bool:
        """Whether all processes stop after `step`; every process must ask at every step."""
        if jax.process_count() == 1:
            return self.asked()
        return multihost_utils.reached_preemption_sync_point(step)
