"""Weights & Biases: `--config.log.writers="['wandb']"` (extra `wandb`; `wandb login` comes first).

The environment variables of wandb hold: `WANDB_PROJECT` (default: vit_jax), `WANDB_ENTITY`,
`WANDB_MODE=offline` and so on. The id of the run lies in the workdir, so that a run that is started
again goes on in the same curves.
"""

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
        id_file = workdir / ID_NAME
        if not id_file.exists():
            storage.write_atomically(id_file, uuid.uuid4().hex[:8].encode())
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "vit_jax"),
            id=id_file.read_text(),
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
