"""Training steps of other libraries, each in a process of its own: threads and memory apart."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from vit_jax.bench.timm_loader import import_torch
from vit_jax.errors import UserError

PEERS = ("timm", "timm-compile")
"""timm as it is, and through `torch.compile`."""

_TIMM_SIZES = {
    "ti": "tiny", "s": "small", "b": "base", "l": "large", "h": "huge", "g": "giant",
    "G": "gigantic",
}  # fmt: skip


class PeerStep:
    """A peer's training step on a made-up batch, waiting in its own process.

    Raises:
      UserError: the peer is not installed, or has no such model.
    """

    def __init__(self, peer: str, model: str, batch_size: int, dtype: str):
        self.name = peer
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "vit_jax.bench.peers",
                peer, timm_name(model), str(batch_size), dtype,
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


def timm_name(model: str) -> str:
    """What timm calls one of our plain ViTs: `vit_s16` → `vit_small_patch16_224`.

    Raises:
      UserError: another family.
    """
    match = re.fullmatch(r"vit_([a-zG]+)(\d\d)", model)
    if not match or match[1] not in _TIMM_SIZES:
        raise UserError(
            f"bench --against compares plain ViTs such as vit_ti16, vit_s16 or vit_b32, not {model}"
        )
    return f"vit_{_TIMM_SIZES[match[1]]}_patch{match[2]}_224"


def serve(arguments: Sequence[str], requests: TextIO, answers: TextIO) -> None:
    """Answers every number of steps with their seconds, after a first answer: the first steps'.

    arguments: peer, its name of the model, batch size, dtype. A user's mistake is answered with the
    message in place of a number.
    """

    def answer(value: float | str) -> None:
        print(json.dumps(value), file=answers, flush=True)

    peer, name, batch_size, dtype = arguments
    try:
        step = _TorchStep(name, int(batch_size), dtype, peer == "timm-compile")
    except UserError as error:
        answer(str(error))
        return
    answer(step.first_seconds)
    for request in requests:
        answer(step.seconds(int(request)))


class _TorchStep:
    """timm's model with fused AdamW and clipping, in autocast below float32."""

    def __init__(self, name: str, batch_size: int, dtype: str, compiled: bool):
        torch = import_torch()
        import timm

        if not timm.is_model(name):
            raise UserError(f"bench --against: timm has no model {name}")
        self._torch = torch
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._autocast = torch.autocast(
            self._device.type, getattr(torch, dtype), enabled=dtype != "float32"
        )
        model = timm.create_model(name, num_classes=1000).to(self._device).train()
        self._params = list(model.parameters())
        self._model = torch.compile(model) if compiled else model
        self._optimizer = torch.optim.AdamW(self._params, lr=1e-3, weight_decay=0.05, fused=True)
        self._images = torch.rand(batch_size, 3, 224, 224, device=self._device)
        self._labels = torch.randint(0, 1000, (batch_size,), device=self._device)
        started = time.perf_counter()
        self.seconds(2)
        self.first_seconds = time.perf_counter() - started

    def seconds(self, steps: int) -> float:
        self._wait()
        started = time.perf_counter()
        for _ in range(steps):
            self._step()
        self._wait()
        return time.perf_counter() - started

    def _step(self) -> None:
        functional = self._torch.nn.functional
        self._optimizer.zero_grad(set_to_none=True)
        with self._autocast:
            loss = functional.cross_entropy(self._model(self._images), self._labels)
        loss.backward()
        self._torch.nn.utils.clip_grad_norm_(self._params, 1.0)
        self._optimizer.step()

    def _wait(self) -> None:
        if self._device.type == "cuda":
            self._torch.cuda.synchronize()


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as own:  # What else is printed goes to the terminal.
        os.dup2(2, 1)
        serve(sys.argv[1:], sys.stdin, own)
