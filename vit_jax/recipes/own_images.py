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


def data_of(root: str, split_column: str = "") -> tuple[str, str, str]:
    """Returns the source, the split for training, and the split for evaluation.

    Args:
      split_column: the column of a table with the split of each row, if there is one.
    """
    path = Path(root).expanduser()
    is_on_hub, has_split = root.startswith(hub.DATASETS), "{split}" in root
    is_pattern = has_split or "*" in root
    if is_on_hub or is_pattern or path.suffix.lower() in SUFFIXES or holds_parquet(path):
        may_have_splits = is_on_hub or has_split or path.is_dir() or split_column
        for split in ("validation", "test") if may_have_splits else ():
            if _has_rows(root, split, split_column):
                return "table", "train", split
        return "table", "train[all but fold 1 of 10]", "train[fold 1 of 10]"
    splits = split_folders(path)
    for split in ("validation", "test"):
        if "train" in splits and split in splits:
            return "folder", "train", split
    # Without a folder for training, the first split there is.
    name = next(iter(splits), "train")
    return "folder", f"{name}[:90%]", f"{name}[90%:]"


def _has_rows(root: str, split: str, split_column: str) -> bool:
    try:
        table = open_tables(root, split)
        if not split_column:
            return True
        table.load("", [split_column])
        return len(rows_in_column(table, split_column, split)) > 0
    except UserError:
        return False


def labeled_splits(root: str) -> tuple[str, str] | None:
    """Returns the splits for training and evaluation of a folder of classes; None without them."""
    source, split, held_out = data_of(root)
    with contextlib.suppress(UserError):
        if source == "folder" and open_source({"source": source, "name": root, "split": split}):
            return split, held_out
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
