"""Weights & Biases: `--config.log.writers="['wandb']"` (extra `wandb`; `wandb login` comes first).

The environment variables of wandb hold: `WANDB_PROJECT` (default: vit_jax), `WANDB_ENTITY`,
`WANDB_MODE=offline` and so on. The id of the run lies in the workdir, so that a run that is started
again goes on in the same curves. A copy of a workdir whose original still exists gets an id of
its own, so that two runs do not write into the same curves.
"""

import contextlib
import io
import os
import uuid
from collections.abc import Mapping
from typing import Any

from etils import epath

from vit_jax import storage
from vit_jax.tracking.rows import Scalar

ID_NAME = "wandb_id"


class Writer:
    """Writes scalars, pictures and the config to one run of Weights & Biases.

    The step is a value of its own, because wandb drops rows whose own step is behind the last one,
    as those of a run that resumes from an earlier checkpoint are.
    """

    def __init__(self, workdir: epath.Path, *, resume_step: int, config: Mapping[str, Any]):
        del resume_step
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{error}; install the extra 'wandb' of vit-jax", name=error.name
            ) from error
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "vit_jax"),
            id=_run_id(workdir),
            resume="allow",
            name=workdir.name,
            config=dict(config),
            dir=None if storage.is_remote(workdir) else os.fspath(workdir),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        """Sends a row; wandb's own thread does the sending."""
        self._run.log({"step": step, **scalars})

    def image(self, step: int, name: str, png: bytes) -> None:
        """Sends a picture, given as the bytes of a PNG file."""
        from PIL import Image

        self._run.log({"step": step, name: self._wandb.Image(Image.open(io.BytesIO(png)))})

    def flush(self) -> None:
        """Does nothing: wandb stores rows in its own files at once."""

    def close(self) -> None:
        """Waits until all rows are sent."""
        self._run.finish()


def _run_id(workdir: epath.Path) -> str:
    """Returns the id of the run in a workdir: the stored one, or a new one, which it stores.

    Below the id, the file names its workdir. A workdir that was moved keeps its id, because the
    folder that the file names does not exist then. A workdir that is reached by two addresses at
    once, such as a bucket and its mount, cannot be told from a copy, and gets a new id.
    """
    here = os.fspath(storage.absolute(workdir))
    found, place = stored = _stored(workdir)
    if not found or (place not in ("", here) and _is_same(place, stored)):
        found = uuid.uuid4().hex[:8]
    if (found, here) != stored:
        storage.write_atomically(workdir / ID_NAME, os.fsencode(f"{found}\n{here}"))
    return found


def _stored(workdir: epath.Path) -> tuple[str, str]:
    """Returns the id in a workdir, and the workdir that it was stored for; "" for what is missing.

    Earlier versions stored the id alone.
    """
    file = workdir / ID_NAME
    found, _, place = os.fsdecode(storage.read_bytes(file) if file.exists() else b"").partition(
        "\n"
    )
    return found, place


def _is_same(workdir: str, stored: tuple[str, str]) -> bool:
    """Returns whether a workdir can be read and holds the same id for the same workdir."""
    with contextlib.suppress(*storage.errors()):
        return _stored(epath.Path(workdir)) == stored
    return False
