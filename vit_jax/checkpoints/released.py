"""Which file of the AugReg release to start from (Steiner et al. 2022, "How to train your ViT?").

The release is an index, `index.csv`, and 51,509 checkpoints in the layout of `npz`: every model was
pre-trained with many combinations of augmentation and regularisation, and each result fine-tuned to
several datasets. Files and index are Google's, under the Apache-2.0 licence.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from etils import epath

from vit_jax.checkpoints import files
from vit_jax.errors import UserError, nearest

AUGREG = "gs://vit_models/augreg"
LICENCE = "Apache-2.0"

COLUMNS = ("ds", "final_val", "filename")


class Released(NamedTuple):
    """A model of the release, in the reference's words.

    name: ours. stem: the reference's, with which its file names start. top1: accuracy on ImageNet
    in percent, after fine-tuning at `resolution`, as the authors of vision_transformer published it
    in their README; not measured here. recipe: the pre-training on ImageNet-21k that gave it.
    """

    name: str
    stem: str
    recipe: str
    top1: float
    resolution: int


RELEASED = (
    Released("vit_l16", "L_16", "strong1, weight decay 0.1", 85.59, 384),
    Released("vit_b16", "B_16", "medium1, weight decay 0.1", 85.49, 384),
    Released("vit_s16", "S_16", "light1, weight decay 0.03", 83.73, 384),
    Released(
        "r50_l32",
        "R50_L_32",
        "medium1, weight decay 0.1, dropout 0.1, stochastic depth 0.1",
        85.99,
        384,
    ),
    Released("r26_s32", "R26_S_32", "light1, weight decay 0.1", 83.85, 384),
    Released("vit_ti16", "Ti_16", "none, weight decay 0.03", 78.22, 384),
    Released("vit_b32", "B_32", "light1, weight decay 0.1", 83.59, 384),
    Released("vit_s32", "S_32", "none, weight decay 0.1", 79.58, 384),
    Released("r_ti16", "R_Ti_16", "none, weight decay 0.03", 75.40, 384),
)


def read_index(path: epath.PathLike) -> list[Mapping[str, str]]:
    """The rows of an `index.csv`. Raises `UserError` where it is none."""
    try:
        text = files.read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text: {error}") from error
    reader = csv.DictReader(io.StringIO(text))
    missing = set(COLUMNS) - set(reader.fieldnames or ())
    if missing:
        raise UserError(f"{path} is no index of AugReg: it has no column {sorted(missing)[0]!r}")
    return list(reader)


def select(name: str, index: Sequence[Mapping[str, str]]) -> str:
    """The file of a model, as the reference chooses it.

    name: the stem of a model (`B_16`), for which the file pre-trained on ImageNet-21k with the best
      final accuracy on its validation split is taken; a name with a `-` is a file's own.

    Raises:
      UserError: the index has no such model.
    """
    if "-" in name:
        return f"{name}.npz"
    rows = [row for row in index if _stem(row) == name and row["ds"] == "i21k"]
    if not rows:
        stems = {_stem(row) for row in index if row["ds"] == "i21k"}
        raise UserError(f"the index has no model {name!r}; {nearest(name, stems)}")
    try:
        best = max(reversed(rows), key=lambda row: float(row["final_val"]))
    except ValueError as error:
        raise UserError(f"the index has a final_val that is no number: {error}") from error
    return f"{best['filename']}.npz"


def _stem(row: Mapping[str, str]) -> str:
    return row["filename"].split("-")[0]
