"""Images to vectors: what a backbone makes of an image before any head."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from vit_jax import checkpoints
from vit_jax.errors import UserError
from vit_jax.inference.predict import Predictor
from vit_jax.parallel import sharding
from vit_jax.storage import write_atomically
from vit_jax.tasks import BaseTask
from vit_jax.types import Array, Params

SUFFIXES = (".jpg", ".jpeg", ".png")


class Embedder:
    """The backbone of a task's model, on all devices of this process.

    params: of the model, with or without its head, as `BaseTask.inference_params` returns them.
    """

    def __init__(self, task: BaseTask, params: Params):
        backbone = task.model.backbone
        devices = jax.local_devices()
        self._mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, devices)
        everywhere = sharding.replicated(self._mesh)
        self._params = jax.device_put(params["backbone"], everywhere)

        def embed(params: Params, images: Array) -> Array:
            features = backbone.apply({"params": params}, task.inputs({"image": images}))
            pooled = features.grid.mean((1, 2)) if features.pooled is None else features.pooled
            return pooled.astype(jnp.float32)

        self._embed = jax.jit(embed, out_shardings=everywhere)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Images of the pipeline `[n, height, width, channels]` to features float32 `[n, dim]`.

        Those that the head reads; a backbone without pooling gives the mean of its grid.
        """
        missing = -len(images) % self._mesh.size
        padded = np.concatenate([images, np.repeat(images[-1:], missing, axis=0)])
        placed = jax.device_put(padded, sharding.batch_sharding(self._mesh))
        with sharding.activate(self._mesh):
            return jax.device_get(self._embed(self._params, placed))[: len(images)]


def backbone_params(task: BaseTask, checkpoint: str, interpolation: str = "corners") -> Params:
    """`{"backbone": ...}` of a checkpoint of any format, for the images of `task`.

    Raises:
      UserError: the checkpoint cannot be read, or is of another model.
    """
    height, width, channels = task.info.spec["image"].shape
    backbone = task.model.backbone
    size = (height, width)
    params = checkpoints.load(
        checkpoint, backbone, image_size=size, channels=channels, interpolation=interpolation
    )
    return {"backbone": params}


def run(images: Sequence[str], out: str, predictor: Predictor, *, batch_size: int = 64) -> str:
    """Writes `features` float32 `[n, dim]` and `path`, text `[n]`, of image files.

    images: files, and folders with everything below them, in the order of their names.
    out: a file that ends in .npz (NumPy) or .parquet (a row an image, lists of fixed length).
    predictor: from `Predictor.from_workdir` or `Predictor.from_checkpoint`.

    Returns:
      What was written, in words.

    Raises:
      UserError: no image, one that cannot be read, or a file that cannot be written.
    """
    encode = _ENCODERS.get(Path(out).suffix)
    if encode is None:
        raise UserError(f"--out={out}: features are written as {' or '.join(_ENCODERS)}")
    files = find_images(images)
    embed = Embedder(predictor.task, predictor.params)
    size = min(batch_size, len(files))
    rows = []
    for start in range(0, len(files), size):
        pixels = predictor.read(files[start : start + size])
        # One shape, so that the last batch compiles nothing.
        filled = np.concatenate([pixels, np.repeat(pixels[-1:], size - len(pixels), axis=0)])
        rows.append(embed(predictor.as_trained(filled))[: len(pixels)])
    features = np.concatenate(rows)
    try:
        write_atomically(epath.Path(out), encode(features, files))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from error
    return f"wrote {out}: features [{features.shape[0]}, {features.shape[1]}] and path"


def find_images(paths: Sequence[str]) -> list[str]:
    """The image files among `paths` and below the folders among them, sorted within each folder.

    Raises:
      UserError: a path that is not there, or a folder without images.
    """
    found: list[str] = []
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(os.fspath(path))
            continue
        below = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not below:
            raise UserError(f"{path}: no image files ({', '.join(SUFFIXES)}) in it or below")
        found += map(os.fspath, below)
    return found


def _npz(features: np.ndarray, paths: Sequence[str]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, features=features, path=np.array(paths))
    return buffer.getvalue()


def _parquet(features: np.ndarray, paths: Sequence[str]) -> bytes:
    # Imported here: half a second that .npz does not need.
    import pyarrow
    import pyarrow.parquet

    vectors = pyarrow.FixedSizeListArray.from_arrays(features.reshape(-1), features.shape[1])
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"path": list(paths), "features": vectors}), buffer)
    return buffer.getvalue()


_ENCODERS = {".npz": _npz, ".parquet": _parquet}
