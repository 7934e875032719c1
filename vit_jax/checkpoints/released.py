"""Chooses a file of the AugReg release (Steiner et al. 2022, "How to train your ViT?").

The release is an index, `index.csv`, and 51,509 checkpoints in the layout of `npz`: every model was
pre-trained with many combinations of augmentation and regularisation, and each result fine-tuned to
several datasets. Files and index are Google's, under the Apache-2.0 licence. All accuracies are
those that the authors published; none was measured here.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from vit_jax import models
from vit_jax.checkpoints import files
from vit_jax.errors import UserError, nearest

AUGREG = "gs://vit_models/augreg"
AUGREG_HTTPS = "https://storage.googleapis.com/vit_models/augreg"
LICENCE = "Apache-2.0"
SOURCE = "README of google-research/vision_transformer"

COLUMNS = (
    "ds",
    "final_val",
    "filename",
    "adapt_ds",
    "adapt_resolution",
    "adapt_final_val",
    "adapt_final_test",
    "adapt_filename",
)


class Released(NamedTuple):
    """A fine-tuned checkpoint of the release.

    model: our name. file: without directory and `.npz`; what stands before its `--` is the file of
    the pre-trained model. pretraining: dataset, i1k, i21k or i21k_30 (30 epochs instead of 300).
    dataset, resolution: what it was fine-tuned to, and the side of the images in pixels.
    validation, test: accuracy in percent; for imagenet2012 the test is the official validation
    split. None where not published.
    """

    model: str
    file: str
    pretraining: str
    dataset: str
    resolution: int
    validation: float | None
    test: float | None


def _chosen(model: str, stem: str, recipe: str, lr: str, test: float) -> Released:
    pretrained = f"{stem}-i21k-300ep-lr_0.001-aug_{recipe}"
    file = f"{pretrained}--imagenet2012-steps_20k-lr_{lr}-res_384"
    return Released(model, file, "i21k", "imagenet2012", 384, None, test)


# The table of `SOURCE`: a file of each model.
CHOSEN = (
    _chosen("r50_l32", "R50_L_32", "medium1-wd_0.1-do_0.1-sd_0.1", "0.01", 85.99),
    _chosen("vit_l16", "L_16", "strong1-wd_0.1-do_0.0-sd_0.0", "0.01", 85.59),
    _chosen("vit_b16", "B_16", "medium1-wd_0.1-do_0.0-sd_0.0", "0.03", 85.49),
    _chosen("r26_s32", "R26_S_32", "light1-wd_0.1-do_0.0-sd_0.0", "0.01", 83.85),
    _chosen("vit_s16", "S_16", "light1-wd_0.03-do_0.0-sd_0.0", "0.03", 83.73),
    _chosen("vit_b32", "B_32", "light1-wd_0.1-do_0.0-sd_0.0", "0.01", 83.59),
    _chosen("vit_s32", "S_32", "none-wd_0.1-do_0.0-sd_0.0", "0.01", 79.58),
    _chosen("vit_ti16", "Ti_16", "none-wd_0.03-do_0.0-sd_0.0", "0.03", 78.22),
    _chosen("r_ti16", "R_Ti_16", "none-wd_0.03-do_0.0-sd_0.0", "0.03", 75.40),
)

PRETRAINED = {one.model: f"{AUGREG_HTTPS}/{one.file.partition('--')[0]}.npz" for one in CHOSEN}
"""The addresses of the files that those of `CHOSEN` were fine-tuned from, by model."""


def read_index(path: epath.PathLike) -> list[Mapping[str, str]]:
    """Returns the rows of an `index.csv`. Raises `UserError` if the file is not such an index."""
    try:
        text = files.read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text: {error}") from error
    reader = csv.DictReader(io.StringIO(text))
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise UserError(f"{path} is no index of AugReg: it has no column {missing[0]!r}")
    return list(reader)


def finetuned(index: Iterable[Mapping[str, str]]) -> list[Released]:
    """Returns the fine-tuned checkpoints of an index. Raises `UserError` if a number is wrong."""

    def percent(row: Mapping[str, str], column: str) -> float:
        return 100 * float(row[column])

    found = []
    for row in index:
        try:
            found.append(
                Released(
                    model=models.find(_stem(row)),
                    file=row["adapt_filename"],
                    pretraining=row["ds"],
                    dataset=row["adapt_ds"],
                    resolution=int(row["adapt_resolution"]),
                    validation=percent(row, "adapt_final_val"),
                    test=percent(row, "adapt_final_test"),
                )
            )
        except (TypeError, ValueError) as error:
            raise UserError(f"the index is broken at {row['adapt_filename']!r}: {error}") from error
    return found


def query(
    released: Iterable[Released],
    *,
    model: Sequence[str] = (),
    pretraining: str | None = None,
    dataset: str | None = None,
    resolution: int | None = None,
) -> list[Released]:
    """Returns the checkpoints that were asked for, the most accurate first.

    Order is by validation accuracy where there is one, as choices should be made, else by test
    accuracy; across datasets it means little. model: any of these names.

    Raises:
      UserError: an unknown model, or nothing of that kind among those that the rest leaves.
    """
    left = list(released)
    wanted = {"dataset": dataset, "pretraining": pretraining, "resolution": resolution}
    asked: dict[str, set[Any]] = {"model": {models.find(name) for name in model}}
    asked |= {field: {value} for field, value in wanted.items() if value is not None}
    for field, values in asked.items():
        if not values:
            continue
        valid = sorted({str(getattr(row, field)) for row in left})
        left = [row for row in left if getattr(row, field) in values]
        if not left:
            named = ", ".join(map(str, sorted(values)))
            raise UserError(f"no released checkpoint with {field} {named}; {nearest(named, valid)}")
    return sorted(left, key=_accuracy, reverse=True)


def _accuracy(row: Released) -> tuple[float, float]:
    measured = (row.test if row.validation is None else row.validation, row.test)
    first, second = (-1.0 if value is None else value for value in measured)
    return first, second


def select(name: str, index: Sequence[Mapping[str, str]]) -> str:
    """Returns the pre-trained file of a model to start from, as the reference chooses it.

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


def describe(
    index: epath.PathLike | None = None,
    *,
    top: int = 10,
    **wanted: Any,
) -> str:
    """Returns the answer to a `query` as text for a person.

    The checkpoints are those of an index, or without one those of `CHOSEN`.

    Raises:
      UserError: as `read_index`, `finetuned` and `query`.
    """
    if top < 1:
        raise UserError(f"--top={top} is no number of checkpoints; write 1 or more")
    rows = read_index(index) if index else []
    found = query(finetuned(rows) if index else CHOSEN, **wanted)
    lines = [f"{'model':10} {'from':8} {'fine-tuned on':22} {'val %':>6} {'test %':>6}  file"]
    for row in found[:top]:
        numbers = ["-" if x is None else f"{x:.2f}" for x in (row.validation, row.test)]
        adapted = f"{row.dataset} @{row.resolution}"
        lines.append(
            f"{row.model:10} {row.pretraining:8} {adapted:22} {numbers[0]:>6} {numbers[1]:>6}"
            f"  {row.file}.npz"
        )
    if len(found) > top:
        lines.append(f"... and {len(found) - top} more (--top)")
    stems = {_stem(row) for row in rows if row["ds"] == "i21k"}
    lines += [
        f"to start from, the reference takes {select(stem, rows)}"
        for stem in sorted(stems)
        if models.find(stem) in {row.model for row in found}
    ]
    source = index or SOURCE
    return "\n".join(
        [
            *lines,
            "",
            f"Accuracies: as their authors published them ({source}); not measured here.",
            f"Addresses: {AUGREG}/FILE or {AUGREG_HTTPS}/FILE",
            "The model before fine-tuning: the name up to --, and .npz. All are listed in"
            f" {AUGREG}/index.csv (--index).",
            f"Licence: {LICENCE}, Google.",
        ]
    )


def _stem(row: Mapping[str, str]) -> str:
    return row["filename"].split("-")[0]
