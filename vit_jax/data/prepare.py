"""Finding and preparing TFDS datasets, ours included."""

import importlib
import pkgutil

from vit_jax.data import builders, host_tensorflow  # noqa: F401  TFDS must not find accelerators.
from vit_jax.errors import UserError, nearest

FILE_FORMAT = "array_record"
"""The format of TFDS that can be read at random."""


def find_builder(name: str, data_dir: str = "", *, file_format: str | None = None):
    """The TFDS builder of `name` (`NAME`, `NAME/CONFIG`, with `:VERSION` if need be).

    Args:
        name: one of ours (`vit_jax/data/builders`), one of TFDS, or one that is only on disk.
        data_dir: where prepared datasets are; empty for TFDS's own default.
        file_format: of a dataset yet to be prepared; None for whichever is on disk.
    """
    import tensorflow_datasets as tfds

    short = name.partition(":")[0].partition("/")[0]
    if short in _own_builders():
        importlib.import_module(f"{builders.__name__}.{short}")  # Registers it with TFDS.
    try:
        kwargs = {"file_format": file_format} if file_format else {}
        return tfds.builder(name, data_dir=data_dir or None, try_gcs=False, **kwargs)
    except tfds.core.registered.DatasetNotFoundError as error:
        known = [*_own_builders(), *tfds.list_builders(with_community_datasets=False)]
        raise UserError(f"TFDS has no dataset {name!r}; {nearest(short, known)}") from error
    except (ValueError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"TFDS cannot open the dataset {name!r}: {reason}") from error


def is_prepared(builder) -> bool:
    """Whether the files of a builder's dataset are there, whole."""
    return (builder.data_path / "dataset_info.json").exists()


def prepare(name: str, data_dir: str = "") -> str:
    """Downloads and writes a dataset for random access; returns the folder it is in.

    Atomic: TFDS writes to a temporary folder and renames it at the end, so an interrupted
    preparation leaves nothing that could be taken for a dataset. Does nothing if it is there.
    """
    import tensorflow_datasets as tfds

    builder = find_builder(name, data_dir, file_format=FILE_FORMAT)
    if not is_prepared(builder):
        try:
            builder.download_and_prepare(file_format=FILE_FORMAT)
        except AssertionError as error:
            # How TFDS says that files must be fetched by hand, with where to put them.
            raise UserError(" ".join(str(error).split())) from error
        except (OSError, tfds.download.DownloadError) as error:
            raise UserError(f"dataset {name!r} could not be prepared: {error}") from error
    return str(builder.data_path)


def _own_builders() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(builders.__path__)]
