"""Our own checkpoints as a source and a target of conversions; `store` does the work."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from etils import epath

from vit_jax import models, storage
from vit_jax.checkpoints import evaluation_params, files
from vit_jax.checkpoints.fit.merging import POSITIONS
from vit_jax.checkpoints.manifest import DamagedError
from vit_jax.checkpoints.store import Store
from vit_jax.checkpoints.weights import Weights, backbone_of
from vit_jax.config import check_trust
from vit_jax.errors import UserError
from vit_jax.models.published import published_arrays
from vit_jax.types import Params

CLASS_ROW = "class_token_position"


def find(path: epath.Path) -> tuple[epath.Path, int] | None:
    """(directory of steps, step) of a workdir, its checkpoints or one of them; None if it is none.

    Of several steps the newest is taken.
    """
    if path.name.isdigit() and (path / evaluation_params.MANIFEST).exists():
        return path.parent, int(path.name)
    for directory in (path / "checkpoints", path):
        steps = Store(directory).steps()
        steps = [s for s in steps if (directory / str(s) / evaluation_params.MANIFEST).exists()]
        if steps:
            return directory, steps[-1]
    return None


def read(directory: epath.Path, step: int) -> Weights:
    """The parameters of a step that its run would publish, such as their moving average.

    Raises:
      UserError: the checkpoint is damaged or holds no parameters.
    """
    path = directory / str(step)
    place = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    try:
        found = evaluation_params.read(directory, step, place)
    except DamagedError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    except (KeyError, TypeError) as error:
        raise UserError(f"{path / evaluation_params.MANIFEST} is broken: {error!r}") from error
    flat = {name.replace(".", "/"): np.asarray(x, np.float32) for name, x in found.params.items()}
    arrays = _numbered(published_arrays(flat))
    backbone, record = _run_of(directory)
    return Weights(
        arrays=arrays,
        format=f"our checkpoint of step {step}",
        class_row=_class_row(backbone, found.metadata),
        grid=_grid(backbone, record, arrays),
        ours=True,
        notes=(found.note,) if found.note else (),
    )


def _run_of(directory: epath.Path) -> tuple[Any, Mapping[str, Any]]:
    """The backbone and the record of the run that wrote the checkpoints; (None, {}) of no run."""
    path = directory.parent / "config.json"
    try:
        record = files.read_json(path) if path.exists() else {}
        check_trust({"model": record["config"]["model"]}, str(path))
        return backbone_of(models.build(**{"num_classes": 1, **record["config"]["model"]})), record
    except (UserError, KeyError, TypeError):
        return None, {}


def _class_row(backbone: Any, metadata: Any) -> bool | None:
    """Whether the position table has a row for the class token: as written, or as the run's config
    says; None where nothing does."""
    if isinstance(metadata, Mapping) and isinstance(metadata.get(CLASS_ROW), bool):
        return metadata[CLASS_ROW]
    return getattr(backbone, "class_token_position", None)


def _grid(
    backbone: Any, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> tuple[int, int] | None:
    """(rows, columns) of the patches of the run's images, where its table has a row for each."""
    stride = models.token_stride(backbone)
    try:
        height, width, _ = record["data_info"]["spec"]["image"]["shape"]
    except (KeyError, TypeError, ValueError):
        return None
    if stride is None or POSITIONS not in arrays:
        return None
    grid = height // stride[0], width // stride[1]
    own_row = int(bool(getattr(backbone, "class_token_position", False)))
    return grid if grid[0] * grid[1] + own_row == arrays[POSITIONS].shape[1] else None


def _numbered(flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Names of `Weights`: blocks numbered, a bare backbone below `backbone/`."""
    bare = not any(name.startswith("backbone/") for name in flat)
    out: dict[str, np.ndarray] = {}
    for name, array in flat.items():
        full = f"backbone/{name}" if bare else name
        tower, blocks, rest = full.partition("/blocks/")
        if blocks:
            out.update({f"{tower}/blocks_{i}/{rest}": x for i, x in enumerate(array)})
        else:
            out[full] = array
    return out


def write(path: epath.PathLike, params: Params, model: nn.Module) -> None:
    """Writes parameters alone as step 0 of `path`. Raises `UserError` if there is something."""
    directory = storage.absolute(path)
    storage.check_writable_name(directory, str(path))
    if directory.exists():
        raise UserError(f"{path} exists; remove it or write to another place")
    directory.mkdir(parents=True)
    metadata = {CLASS_ROW: bool(getattr(backbone_of(model), "class_token_position", False))}
    store = Store(directory)
    store.save(0, {"params": jax.tree.map(np.asarray, nn.meta.unbox(params))}, metadata)
    store.wait()
    store.close()
