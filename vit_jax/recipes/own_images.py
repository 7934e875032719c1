"""A user's own images and a released model, which several configs start from.

source, split, held_out = own_images.data_of(root)
config.model, config.init.checkpoint = own_images.model_of(checkpoint)
"""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

from vit_jax import checkpoints, models
from vit_jax.checkpoints import hub
from vit_jax.checkpoints.released import PRETRAINED
from vit_jax.data import open_source
from vit_jax.data.sources._table_names import SUFFIXES, open_tables
from vit_jax.data.sources.folder import split_folders
from vit_jax.data.sources.table import rows_in_column
from vit_jax.errors import UserError, nearest
from vit_jax.storage import is_remote


def data_of(
    root: str, split_column: str = "", group: str = "", val: float = 0.0
) -> tuple[str, str, str]:
    """Returns the source, the split for training, and the split for evaluation.

    Args:
      split_column: the column of a table with the split of each row, if there is one.
      group: what tells the group of each image, if there are groups. They are not divided.
      val: the share of the images that is held out. 0 is a tenth, and the data's own split for
        evaluation if there is one.

    Raises:
      UserError: the data cannot be divided so.
    """
    source, train, held_out = _own_splits(root, split_column)
    if held_out and val:
        raise UserError(
            f"config argument val={val:g}: {root} has its own split {held_out!r}; leave out val"
        )
    if held_out:
        return source, train, held_out
    divide = _folds if source == "table" or group else _ranges
    return source, *divide(train, val or 0.1)


def _own_splits(root: str, split_column: str) -> tuple[str, str, str]:
    """Returns the source, the split for training, and that for evaluation, "" without one."""
    path = Path(root).expanduser()
    is_on_hub, has_split = root.startswith(hub.DATASETS), "{split}" in root
    is_pattern, is_file = has_split or "*" in root, path.suffix.lower() in SUFFIXES
    # Folders of images are read from local disks alone.
    if is_remote(root) or is_pattern or is_file or holds_parquet(path):
        may_have_splits = is_on_hub or has_split or split_column or not (is_pattern or is_file)
        for split in ("validation", "test") if may_have_splits else ():
            if _has_rows(root, split, split_column):
                return "table", "train", split
        return "table", "train", ""
    splits = split_folders(path)
    for split in ("validation", "test"):
        if "train" in splits and split in splits:
            return "folder", "train", split
    # Without a folder for training, the first split there is.
    return "folder", next(iter(splits), "train"), ""


def _ranges(split: str, val: float) -> tuple[str, str]:
    """Returns two parts of a split by percent."""
    percent = round(100 * val)
    if not (0 < percent < 100 and abs(percent - 100 * val) < 1e-6):
        raise UserError(
            f"config argument val={val:g}: write a share of the images in whole percent, such as"
            " val=0.2"
        )
    return f"{split}[:{100 - percent}%]", f"{split}[{100 - percent}%:]"


def _folds(split: str, val: float) -> tuple[str, str]:
    """Returns all folds of a split but one, and that one, which has the share `val`."""
    count = round(1 / val) if val > 0 else 0
    if count < 2 or abs(count * val - 1) > 0.02:
        near = max(2, count)
        raise UserError(
            f"config argument val={val:g}: one of several equal folds is held out, so write their"
            f" share, such as val={1 / near:.3g} for one of {near}"
        )
    return f"{split}[all but fold 1 of {count}]", f"{split}[fold 1 of {count}]"


def _has_rows(root: str, split: str, split_column: str) -> bool:
    try:
        table = open_tables(root, split)
        if not split_column:
            return table.is_of_split
        table.load("", [split_column])
        return len(rows_in_column(table, split_column, split)) > 0
    except UserError:
        return False


def labeled_splits(root: str) -> tuple[str, str, int] | None:
    """Returns the splits for training and evaluation of a folder of classes, and its size.

    The size is the number of training images. The result is None for what is no such folder.
    """
    source, split, held_out = data_of(root)
    with contextlib.suppress(UserError):
        if source == "folder":
            found = open_source({"source": source, "name": root, "split": split})
            return split, held_out, len(found)
    return None


def holds_parquet(path: Path) -> bool:
    """Returns whether a folder is a dataset in Parquet."""
    return path.is_dir() and any(
        True for pattern in ("*.parquet", "*/*.parquet") for _ in path.glob(pattern)
    )


def count_images(data: Any, advice: str = "") -> int:
    """Returns the number of training images of `config.data`.

    It is 0 if they cannot be read. A printed line tells why, with `advice`.
    """
    try:
        return len(open_source({**{k: data[k] for k in ("source", "name", "split")}, **data.args}))
    except UserError as error:
        print(
            f"the training images cannot be counted, so nothing is chosen by their number: {error}"
            + advice,
            file=sys.stderr,
        )
        return 0


def batch_size(count: int) -> int:
    """Returns about 30 batches an epoch: powers of 2 from 16 to 256."""
    return min(256, max(16, 2 ** max(0, count // 30).bit_length() // 2)) if count else 64


def model_of(checkpoint: str, model: str = "") -> tuple[dict[str, Any], str]:
    """Returns `config.model` for a checkpoint, and where the checkpoint is."""
    if checkpoint in PRETRAINED:
        return {"name": checkpoint}, PRETRAINED[checkpoint]
    if model:
        models.find(model)
        return {"name": model}, checkpoint
    if address := hub.address_of(checkpoint):
        return {"name": checkpoint}, address
    if "://" not in checkpoint and not os.path.exists(os.path.expanduser(checkpoint)):
        raise UserError(
            f"checkpoint={checkpoint}: there is no such file or folder, and no released model;"
            f" {nearest(checkpoint, PRETRAINED)}"
        )
    try:
        return checkpoints.model_config(checkpoint), checkpoint
    except UserError as error:
        raise UserError(f"{error}; or write the name of its model, too (model=vit_s16)") from error
