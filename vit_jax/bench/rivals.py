"""Runs other libraries for comparisons with this package, each in a separate process.

The scripts that run them are in `benchmarks/` of a checkout; they are not part of the installed
package.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_jax.errors import UserError
from vit_jax.plugins import check_known

SCRIPTS = Path(__file__).parents[2] / "benchmarks"

RIVALS: Mapping[str, Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "step": {
        "timm": ("timm_step.py", ()),
        "timm-compile": ("timm_step.py", ("compile",)),
        "big_vision": ("flax_step.py", ()),
        "vision_transformer": ("flax_step.py", ()),
    },
    "input": {
        "timm": ("timm_loader.py", ()),
        "tfrecord": ("tfrecord_loader.py", ()),
        "ffcv": ("ffcv_loader.py", ()),
        "grain": ("grain_loader.py", ()),
    },
}
"""The rivals of `bench step --model` and `bench input`: name -> script and its last arguments."""

STORED_ONLY = ("ffcv",)
"""The rivals that read no image files, but a file of their own with images encoded anew."""


def parse(text: str, what: str) -> list[str]:
    """Returns the rivals that `--against` lists for `bench {what}`: NAME or NAME:CHECKOUT each.

    Raises:
      UserError: one of them is not known.
    """
    rivals = text.split(",") if text else []
    for rival in rivals:
        name = rival.partition(":")[0]
        check_known(name, RIVALS[what], f"bench {what} --against={name}")
    return rivals


class Rival:
    """A rival in a separate process, which runs steps or batches on request.

    Attributes:
      name: its name in `--against`.
      ready_seconds: the seconds from its start until it is ready, including compilation.

    Raises:
      UserError: the rival is not installed, does not support the measurement, or there is no
        checkout.
    """

    def __init__(self, script: str, name: str, *arguments: object):
        if not (SCRIPTS / script).is_file():
            raise UserError(
                f"bench --against={name} needs a checkout of this project: {SCRIPTS / script} is"
                " missing"
            )
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPTS / script), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self.ready_seconds = self._answer()
        except BaseException:
            self.close()
            raise

    @classmethod
    def of_step(cls, rival: str, model: str, batch_size: int, dtype: str) -> "Rival":
        """Returns the rival's training step on a synthetic batch, for our name of a model."""
        name, _, checkout = rival.partition(":")
        script, last = RIVALS["step"][name]
        first = (name, checkout) if script == "flax_step.py" else ()
        return cls(script, name, *first, model, batch_size, dtype, *last)

    @classmethod
    def of_input(cls, name: str, folder: str, pp: str, batch_size: int) -> "Rival":
        """Returns the rival's loader on the image files of a folder, with our preprocessing."""
        script, last = RIVALS["input"][name]
        return cls(script, name, folder, pp, batch_size, *last)

    def seconds(self, count: int) -> float:
        """Returns the seconds that `count` consecutive steps or batches take."""
        return self._ask(str(count))

    def peak_bytes(self) -> int | None:
        """Returns the most bytes that it has held on a GPU; None where it does not know."""
        return self._ask("peak")

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, request: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{request}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.name} ended; its error is above")
        answer = json.loads(line)
        if isinstance(answer, str):
            raise UserError(answer)
        return answer
