"""`train --profile=START:STOP`: a trace of some steps, for XProf and TensorBoard."""

import dataclasses
import logging
import re
import shutil
import tempfile
from pathlib import Path

import jax
from etils import epath

from vit_jax import storage
from vit_jax.errors import UserError, quoted
from vit_jax.types import Array

FOLDER = "profile"

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Profiler:
    """Traces the steps from `first` to `last` into `WORKDIR/profile/`, a file for each process.

    Without steps it does nothing. A run that resumes between the two traces the rest.
    """

    first: int = 0
    last: int = 0
    _scratch: str = ""

    @classmethod
    def parse(cls, text: str) -> "Profiler":
        """Returns the profiler for `START:STOP`, both steps included; "" traces nothing.

        Raises:
          UserError: the text does not name two steps in order.
        """
        if not text:
            return cls()
        text = str(text)
        match = re.fullmatch(r"(\d{1,18}):(\d{1,18})", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(
                f"profile={quoted(text)[1:-1]}: write START:STOP, such as 10:15, counting from 1"
            )
        return cls(int(match[1]), int(match[2]))

    def check(self, total: int) -> None:
        """Raises a `UserError` if a run of `total` steps ends before the first traced step."""
        if self.first > total:
            raise UserError(f"profile={self.first}:{self.last}: the run has only {total} steps")

    def before(self, step: int) -> None:
        """Starts the trace if `step` is traced; called before each step."""
        if self.first <= step <= self.last and not self._scratch:
            self._scratch = tempfile.mkdtemp(prefix="vit_jax_profile_")
            jax.profiler.start_trace(self._scratch)

    def after(self, step: int, result: Array, workdir: epath.Path) -> None:
        """Ends the trace after its last step; called once each step has been started.

        Args:
          result: an output of the step, to wait for.
        """
        if self._scratch and step >= self.last:
            result.block_until_ready()
            self.finish(workdir)

    def finish(self, workdir: epath.Path) -> None:
        """Ends the trace, if there is one, and copies it into the workdir.

        A trace that cannot be written costs a warning, and not the run.
        """
        if not self._scratch:
            return
        jax.profiler.stop_trace()
        try:
            for path in Path(self._scratch).rglob("*"):
                if path.is_file():
                    target = workdir / FOLDER / path.relative_to(self._scratch)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(path.read_bytes())
        except storage.errors() as error:
            logger.warning("cannot write the profile into %s: %s", workdir, error)
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch = ""
