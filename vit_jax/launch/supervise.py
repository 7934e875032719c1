"""A parent process that restarts a run that was interrupted.

If a process of a run is lost, JAX ends the others from within C++, where no Python code can print a
reason or choose the exit code. The parent process does both.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from vit_jax.errors import Interrupted

LONG_SECONDS = 600.0
"""The count of restarts begins again if a run lasted this long before it was interrupted."""

MAX_PAUSE_SECONDS = 60.0

_LOOK_SECONDS = 0.2


def run(
    arguments: Sequence[str], restarts: int, pause: Callable[[float], None] | None = None
) -> int:
    """Runs `python -m vit_jax ARGUMENTS` until it ends for good; returns its exit code.

    The run is restarted after exit code 75 and after a signal that it did not catch (as when JAX
    ends it because another process was lost), up to `restarts` times in a row. It is not restarted
    after SIGTERM or Ctrl-C to this parent, which are passed on to the run.
    """
    command = [sys.executable, "-m", "vit_jax.launch.child", str(os.getpid()), *arguments]
    in_a_row = 0
    with _Forwarding() as forwarding:
        while True:
            started = time.monotonic()
            code = _exit_code(forwarding.call(command))
            if code != Interrupted.exit_code or forwarding.received:
                return code
            in_a_row = 1 if time.monotonic() - started > LONG_SECONDS else in_a_row + 1
            if in_a_row > restarts:
                _say(f"cut short {in_a_row} times in a row; giving up")
                return code
            _say(f"starting again ({in_a_row} of {restarts})")
            (pause or forwarding.pause)(pause_seconds(in_a_row))
            if forwarding.received:
                return code


def pause_seconds(restarts: int) -> float:
    """Returns the pause before a restart, which doubles with each of `restarts` in a row."""
    return min(2.0 ** min(restarts, 100), MAX_PAUSE_SECONDS)


def _exit_code(returned: int) -> int:
    if returned >= 0:
        return returned
    try:
        name = signal.Signals(-returned).name
    except ValueError:  # One of the real-time signals, which have numbers alone.
        name = f"signal {-returned}"
    reason = ": another process of this run was lost" if name == "SIGABRT" else ""
    _say(f"the run was ended by {name}{reason}; it goes on from its last checkpoint")
    return Interrupted.exit_code


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class _Forwarding:
    """Passes SIGTERM and Ctrl-C on to the running child within its `with` block."""

    def __init__(self) -> None:
        self.received = False
        self._pending: int | None = None
        self._child: subprocess.Popen | None = None
        self._previous: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> "_Forwarding":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = True
        if self._child is None:
            self._pending = number
        else:
            self._child.send_signal(number)

    def pause(self, seconds: float) -> None:
        """Waits so long, or until a signal to end arrives."""
        end = time.monotonic() + seconds
        while not self.received and time.monotonic() < end:
            time.sleep(_LOOK_SECONDS)

    def call(self, command: Sequence[str]) -> int:
        # Without a separate process group, Ctrl-C in a terminal would reach the child twice.
        self._child = child = subprocess.Popen(command, process_group=0)
        if self._pending is not None:  # It arrived while the child was being made.
            child.send_signal(self._pending)
        try:
            return child.wait()
        finally:
            self._child = None
