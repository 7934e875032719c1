"""Training steps of other libraries, each in a process of its own: threads and memory apart."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from vit_jax.errors import UserError

if TYPE_CHECKING:
    from vit_jax.bench.flax_step import FlaxStep
    from vit_jax.bench.torch_step import TorchStep

_CHECKOUTS = ("big_vision", "vision_transformer")

PEERS = ("timm", "timm-compile", *_CHECKOUTS)
"""timm as it is, and through `torch.compile`; the others as NAME:FOLDER, the user's checkout."""


class PeerStep:
    """A peer's training step on a made-up batch, waiting in its own process.

    Raises:
      UserError: the peer is not installed, or has no such model.
    """

    def __init__(self, peer: str, model: str, batch_size: int, dtype: str):
        self.name = peer.partition(":")[0]
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "vit_jax.bench.peers",
                peer, model, str(batch_size), dtype,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        self.compile_seconds = self._answer()

    def seconds(self, steps: int) -> float:
        """How long so many steps take, one after the other."""
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> float:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.name} ended; it says above why")
        answer = json.loads(line)
        if isinstance(answer, str):
            raise UserError(answer)
        return answer


def serve(arguments: Sequence[str], requests: TextIO, answers: TextIO) -> None:
    """Answers every number of steps with their seconds, after a first answer: the first steps'.

    arguments: peer, our name of the model, batch size, dtype. A user's mistake is answered with the
    message in place of a number.
    """

    def answer(value: float | str) -> None:
        print(json.dumps(value), file=answers, flush=True)

    peer, model, batch_size, dtype = arguments
    try:
        step = _open(peer, model, int(batch_size), dtype)
    except UserError as error:
        answer(str(error))
        return
    answer(step.first_seconds)
    for request in requests:
        answer(step.seconds(int(request)))


def _open(peer: str, model: str, batch_size: int, dtype: str) -> "FlaxStep | TorchStep":
    name, _, checkout = peer.partition(":")
    if name in _CHECKOUTS:
        if not checkout:
            raise UserError(
                f"bench --against={name}: give the folder of its checkout, as in "
                f"--against={name}:/path/to/{name}"
            )
        from vit_jax.bench.flax_step import FlaxStep

        return FlaxStep(name, checkout, model, batch_size, dtype)
    from vit_jax.bench.torch_step import TorchStep

    return TorchStep(model, batch_size, dtype, compiled=name == "timm-compile")


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as own:  # What else is printed goes to the terminal.
        os.dup2(2, 1)
        serve(sys.argv[1:], sys.stdin, own)
