"""`train --profile=START:STOP`: a trace of some steps, for XProf and TensorBoard."""

import dataclasses
import re
import shutil
import tempfile
from pathlib import Path

import jax
from etils import epath

from vit_jax.errors import UserError
from vit_jax.types import Array

FOLDER = "profile"


@dataclasses.dataclass
class Profiler:
    """Traces the steps from `first` to `last` into `WORKDIR/profile/`, a file for each process.

    Without steps it does nothing. A run that resumes between the two traces what is left.
    """

    first: int = 0
    last: int = 0
    _scratch: str = ""

    @classmethod
    def parse(cls, text: str) -> "Profiler":
        """`START:STOP`, both included; empty for none.

        Raises:
          UserError: it is not two steps in order.
        """
        if not text:
            return cls()
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(f"--profile={text}: write START:STOP, such as 10:15, counting from 1")
        return cls(int(match[1]), int(match[2]))

    def check(self, total: int) -> None:
        """Raises `UserError` where a run of `total` steps never gets to the first of them."""
        if self.first > total:
            raise UserError(f"--profile={self.first}:{self.last}: the run has only {total} steps")

    def before(self, step: int) -> None:
        """To be called before each step."""
        if self.first <= step <= self.last and not self._scratch:
            self._scratch = tempfile.mkdtemp(prefix="vit_jax_profile_")
            jax.profiler.start_trace(self._scratch)

    def after(self, step: int, result: Array, workdir: epath.Path) -> None:
        """To be called after each step has been started; result: something that it computes."""
        if self._scratch and step >= self.last:
            result.block_until_ready()
            self.finish(workdir)

    def finish(self, workdir: epath.Path) -> None:
        """Ends a trace that is going on, and puts it into the workdir."""
        if not self._scratch:
            return
        jax.profiler.stop_trace()
        for path in Path(self._scratch).rglob("*"):
            if path.is_file():
                target = workdir / FOLDER / path.relative_to(self._scratch)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch = ""
