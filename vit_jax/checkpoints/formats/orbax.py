"""Checkpoints of this package: workdirs, their folders of steps, and single steps."""

import os
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from etils import epath

from vit_jax import models, storage
from vit_jax.checkpoints import evaluation_params, files
from vit_jax.checkpoints.formats import Format, ImageSize
from vit_jax.checkpoints.manifest import DamagedError
from vit_jax.checkpoints.source import CONFIG, Source
from vit_jax.checkpoints.store import Store
from vit_jax.checkpoints.weights import POSITIONS, Weights
from vit_jax.config import check_trust
from vit_jax.errors import UserError
from vit_jax.models import Traits
from vit_jax.models.published import published_arrays
from vit_jax.types import Params

CLASS_ROW = "class_token_position"


def matches(source: Source) -> bool:
    """Returns whether a folder is a run of this package, or holds checkpoints of one."""
    return source.folder is not None and find(source.folder) is not None


def find(path: epath.Path) -> tuple[epath.Path, int] | None:
    """Returns (folder of steps, step) of a workdir, its checkpoints or one of them, or None.

    The newest of several steps is taken.
    """
    if path.name.isdigit() and (path / evaluation_params.MANIFEST).exists():
        return path.parent, int(path.name)
    for directory in (path / "checkpoints", path):
        steps = Store(directory).steps()
        steps = [s for s in steps if (directory / str(s) / evaluation_params.MANIFEST).exists()]
        if steps:
            return directory, steps[-1]
    return None


def read(source: Source) -> Weights:
    """Returns the parameters that evaluation would use, such as a moving average.

    Raises:
      UserError: the checkpoint is damaged or holds no parameters.
    """
    directory, step = _found(source)
    path = directory / str(step)
    files.check_tree(path)
    place = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    try:
        found = evaluation_params.read(directory, step, place)
    except DamagedError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    flat = {name.replace(".", "/"): np.asarray(x, np.float32) for name, x in found.params.items()}
    arrays = _numbered(published_arrays(flat))
    traits, record, stride = _run_of(directory)
    return Weights(
        arrays=arrays,
        format=f"vit_jax checkpoint of step {step}",
        class_row=_class_row(traits, found.metadata),
        grid=_grid(traits, stride, record, arrays),
        ours=True,
        notes=(found.note,) if found.note else (),
    )


def _found(source: Source) -> tuple[epath.Path, int]:
    found = None if source.folder is None else find(source.folder)
    if found is None:
        raise UserError(f"{source.path} holds no checkpoint of this package")
    return found


def _run_of(
    directory: epath.Path,
) -> tuple[Traits | None, Mapping[str, Any], tuple[int, int] | None]:
    """Returns the traits of a run's model, its record, and the stride from token to token.

    There are none without a run, or where its config names code that nobody trusts.
    """
    path = directory.parent / CONFIG
    try:
        record = files.read_json(path) if path.exists() else {}
        check_trust({"model": record["config"]["model"]}, str(path))
        model = models.build(**{"num_classes": 1, **record["config"]["model"]})
        backbone = models.backbone_of(model)
    except (UserError, KeyError, TypeError):
        return None, {}, None
    return models.traits_of(backbone), record, models.token_stride(backbone)


def model_config(source: Source) -> Mapping[str, Any] | None:
    """Returns the section `config.model` of the run that the checkpoint is of."""
    traits, record, _ = _run_of(_found(source)[0])
    return record["config"]["model"] if traits else None


def _class_row(traits: Traits | None, metadata: Any) -> bool | None:
    """Returns whether the position table has a row for the class token; None where unknown."""
    if isinstance(metadata, Mapping) and isinstance(metadata.get(CLASS_ROW), bool):
        return metadata[CLASS_ROW]
    return traits.class_token_position if traits else None


def _grid(
    traits: Traits | None,
    stride: tuple[int, int] | None,
    record: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
) -> tuple[int, int] | None:
    """Returns (rows, columns) of a run's patches, if the table has a row for each of them."""
    try:
        height, width, _ = record["data_info"]["spec"]["image"]["shape"]
    except (KeyError, TypeError, ValueError):
        return None
    if traits is None or stride is None or POSITIONS not in arrays:
        return None
    grid = height // stride[0], width // stride[1]
    rows = grid[0] * grid[1] + int(traits.class_token_position)
    return grid if rows == arrays[POSITIONS].shape[1] else None


def _numbered(flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the names of `Weights`: blocks numbered, a bare backbone below `backbone/`."""
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


def write(path: epath.PathLike, params: Params, model: nn.Module, image_size: ImageSize) -> str:
    """Writes parameters alone as step 0 of a new folder; see `Format.write`.

    Raises:
      UserError: there is something at `path` already, or its name cannot be written.
    """
    del image_size
    directory = storage.absolute(path)
    storage.check_writable_name(directory, str(path))
    if directory.exists():
        raise UserError(f"{path} exists; remove it or write to another place")
    directory.mkdir(parents=True)
    metadata = {CLASS_ROW: models.traits_of(model).class_token_position}
    store = Store(directory)
    store.save(0, {"params": jax.tree.map(np.asarray, nn.meta.unbox(params))}, metadata)
    store.wait()
    store.close()
    return f"wrote {os.fspath(path)}: load with vit_jax.checkpoints.load(path, model)"


FORMAT = Format(
    label="vit_jax checkpoint",
    matches=matches,
    read=read,
    write=write,
    expresses=None,
    model_config=model_config,
)
