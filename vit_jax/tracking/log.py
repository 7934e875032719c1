"""The metrics log of a run, and the protocol of the writers that receive its rows.

A writer is a plug-in: a module of `vit_jax.tracking.writers` with a class `Writer`, or a class of
the user's own that `config.log.writers` names as `package.module:Class`. `jsonl` is always one of
them, because the report reads its file.
"""

import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from etils import epath
from ml_collections import ConfigDict

from vit_jax.errors import UserError
from vit_jax.plugins import Kind
from vit_jax.tracking.rows import Scalar, read_metrics

logger = logging.getLogger(__name__)

KIND = Kind("log writer", "vit_jax.tracking.writers", "Writer", "package.module:Class")

ALWAYS = "jsonl"
"""The writer that every run has."""


class Writer(Protocol):
    """Writes the rows of one run to a destination.

    The class is called as `Writer(workdir, resume_step=..., config=...)`: the `epath.Path` of the
    run's directory, the step that the run resumes after (0 for a fresh one), and the config as
    nested dicts. Only process 0 has writers. A writer sees each (step, name) once, also when a
    resumed run computes a value again.

    An exception in a method is logged as one warning and never ends the run; the writer is called
    again for later rows. If the constructor raises, the run continues without this writer, unless
    the exception is a `UserError`.

    A writer may also have `message(text)` for the lines that the console shows, and
    `image(step, name, png)` for the pictures of the report, as bytes of a PNG file.
    """

    def write(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        """Writes the values of `step`. The training step waits for this call."""

    def flush(self) -> None:
        """Makes all rows so far durable; called when a checkpoint is saved."""

    def close(self) -> None:
        """Closes files and connections; called once, at the end."""


def writer_names(section: ConfigDict) -> list[str]:
    """Returns the names of the writers that `config.log` names.

    Raises:
      UserError: one of them does not exist.
    """
    for name in section.writers:
        KIND.find(name, "config.log.writers")
    return [name for name in section.writers if name != "tensorboard" or section.tensorboard]


class MetricsLog:
    """Passes rows of scalars to the writers of a run.

    A value is logged once: the first value written for a (step, name) is kept, also when a
    restarted run computes it again. A second write for a step adds only the names that are new.

    Args:
      workdir: directory of the run, local or on an object store; made if absent.
      resume_step: the step the run continues from; 0 for a fresh run. Later rows are removed.
      writers: names of writers besides `jsonl`.
      config: the run's config as nested dicts, for the writers.
      is_writer: False on processes other than the first, whose log then does nothing.
      warn: called with a line about a writer that fails.

    Raises:
      UserError: a writer does not exist, or the workdir cannot be written to.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        resume_step: int,
        writers: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
        is_writer: bool = True,
        warn: Callable[[str], None] = logger.warning,
    ):
        self._warn = warn
        self._warned: set[str] = set()
        self._writers: dict[str, Writer] = {}
        self._names_at: dict[int, set[str]] = {}
        if not is_writer:
            return
        workdir = epath.Path(workdir)
        for name in dict.fromkeys([ALWAYS, *writers]):
            open_writer = KIND.find(name, "config.log.writers")
            try:
                self._writers[name] = open_writer(
                    workdir, resume_step=resume_step, config=config or {}
                )
            except UserError:
                raise
            except Exception as error:  # A tracker that is down must not prevent training.
                self._warn(f"warning: log writer {name} cannot start: {_line(error)}")
        for row in read_metrics(workdir):
            self._names_at.setdefault(int(row["step"]), set()).update(row)

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Logs `scalars` (anything `float` takes: Python, NumPy or JAX) as values of `step`."""
        if not self._writers:
            return
        if "step" in scalars:
            raise ValueError("'step' is the row's own key and cannot name a metric")
        step = operator.index(step)
        known = self._names_at.setdefault(step, set())
        new = {name: _plain(value) for name, value in scalars.items() if name not in known}
        if new:
            known.update(new)
            self._tell("write", step, new)

    def message(self, text: str) -> None:
        """Passes a line of the console to the writers that have `message`."""
        self._tell("message", text)

    def image(self, step: int, name: str, png: bytes) -> None:
        """Passes a picture, as bytes of a PNG file, to the writers that have `image`."""
        self._tell("image", step, name, png)

    def flush(self) -> None:
        """Makes all rows so far durable; called when a checkpoint is saved."""
        self._tell("flush")

    def close(self) -> None:
        """Closes all writers; may be called twice."""
        self._warned.clear()  # Rows lost at the end stay lost, so a second warning is due.
        self._tell("close")
        self._writers = {}

    def _tell(self, method: str, *args: Any) -> None:
        for name, writer in self._writers.items():
            try:
                getattr(writer, method, _ignore)(*args)
            except Exception as error:  # No error in a writer may end a run.
                if name not in self._warned:
                    self._warned.add(name)
                    self._warn(f"warning: log writer {name} failed: {_line(error)}")


def _ignore(*_: Any) -> None:
    """Replaces the optional methods that a writer does not have."""


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _plain(value: Any) -> Scalar:
    """Returns any scalar as a Python int or float; integers of any size stay exact."""
    try:
        return int(operator.index(value))
    except TypeError:
        return float(value)
