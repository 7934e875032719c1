"""Computes embeddings of images: the pooled output of a backbone, before any head."""

import io
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from vit_jax import checkpoints
from vit_jax.errors import UserError
from vit_jax.inference.predict import Predictor
from vit_jax.inference.preparation import Picture, as_pictures, find_images
from vit_jax.parallel import sharding
from vit_jax.storage import write_atomically
from vit_jax.tasks import BaseTask
from vit_jax.types import Array, Features, Params


def _output(backbone: Any, params: Params, images: Array) -> Array:
    found: Features = backbone.apply({"params": params}, images)
    return found.vector()


class Embedder:
    """Computes embeddings with the backbone of a task's model, on all devices of this process.

    Args:
      params: the parameters of the model, with or without its head, as
        `BaseTask.inference_params` returns them.
      compute: other features than the output before the head: from the backbone, its parameters and
        images as the model takes them, to arrays by name.
    """

    def __init__(
        self,
        task: BaseTask,
        params: Params,
        compute: Callable[[Any, Params, Array], Any] = _output,
    ):
        backbone = task.model.backbone
        devices = jax.local_devices()
        self._mesh = sharding.data_mesh(devices)
        everywhere = sharding.replicated(self._mesh)
        self._params = jax.device_put(params["backbone"], everywhere)

        def embed(params: Params, images: Array) -> Any:
            return compute(backbone, params, task.inputs({"image": images}))

        self._embed = jax.jit(embed, out_shardings=everywhere)

    def __call__(self, images: np.ndarray) -> Any:
        """Returns what `compute` makes of images.

        By default these are the features float32 `[n, dim]`, the input of the head; for a backbone
        without pooling, the mean of its grid.

        Args:
          images: `[n, height, width, channels]` as the pipeline yields them.
        """
        missing = -len(images) % self._mesh.size
        padded = np.concatenate([images, np.repeat(images[-1:], missing, axis=0)])
        placed = jax.device_put(padded, sharding.batch_sharding(self._mesh))
        with sharding.activate(self._mesh):
            found = jax.device_get(self._embed(self._params, placed))
        return jax.tree.map(lambda rows: rows[: len(images)], found)


def backbone_params(task: BaseTask, checkpoint: str, interpolation: str = "auto") -> Params:
    """Returns `{"backbone": ...}` of a checkpoint of any format, for the image size of `task`.

    Raises:
      UserError: the checkpoint cannot be read, or belongs to another model.
    """
    height, width, channels = task.image_spec.shape
    backbone = task.model.backbone
    size = (height, width)
    params = checkpoints.load(
        checkpoint, backbone, image_size=size, channels=channels, interpolation=interpolation
    )
    return {"backbone": params}


def features(model: Predictor | str | os.PathLike, images: Iterable[Picture]) -> np.ndarray:
    """Returns the embeddings of images, float32 `[n, dim]`: the backbone's output before any head.

    Args:
      model: a predictor, or the path of a workdir or of a checkpoint in any format.
      images: image files, or uint8 pixels `[height, width, 1 or 3]`, of any sizes; or the path of
        a single file. They are prepared as the predictor prepares them.

    Raises:
      UserError: the model or an image cannot be read.
    """
    predictor = Predictor.open(model, headless=True)
    embed = Embedder(predictor.task, predictor.params)
    batches = predictor.batches(as_pictures(images))
    return np.concatenate([embed(batch["image"])[batch["mask"] > 0] for batch in batches])


def run(images: Sequence[str], out: str, predictor: Predictor) -> str:
    """Writes `features` float32 `[n, dim]` and `path`, text `[n]`, of image files.

    Images are prepared as `predictor` prepares them.

    Args:
      images: files, folders and patterns; see `find_images`.
      out: a file that ends in .npz (NumPy) or .parquet (one row for each image, lists of fixed
        length).
      predictor: from `Predictor.from_workdir` or `Predictor.from_checkpoint`.

    Returns:
      A line that describes the file.

    Raises:
      UserError: there is no image, an image cannot be read, or the file cannot be written.
    """
    encode = _ENCODERS.get(Path(out).suffix)
    if encode is None:
        raise UserError(f"--out={out}: features are written as {' or '.join(_ENCODERS)}")
    files = find_images(images)
    found = features(predictor, files)
    try:
        write_atomically(epath.Path(out), encode(found, files))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from error
    return f"wrote {out}: features [{found.shape[0]}, {found.shape[1]}] and path"


def _npz(features: np.ndarray, paths: Sequence[str]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, features=features, path=np.array(paths))
    return buffer.getvalue()


def _parquet(features: np.ndarray, paths: Sequence[str]) -> bytes:
    # This import takes half a second, which .npz files do not need.
    import pyarrow
    import pyarrow.parquet

    vectors = pyarrow.FixedSizeListArray.from_arrays(features.reshape(-1), features.shape[1])
    buffer = io.BytesIO()
    # Names of files that are not valid UTF-8 are no texts of Parquet.
    names = [path.encode(errors="backslashreplace").decode() for path in paths]
    pyarrow.parquet.write_table(pyarrow.table({"path": names, "features": vectors}), buffer)
    return buffer.getvalue()


_ENCODERS = {".npz": _npz, ".parquet": _parquet}
