"""Exports a trained model as a program for other runtimes, and checks what was written."""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from vit_jax import models
from vit_jax.data.files import reason
from vit_jax.errors import UserError, WrongExport, quoted
from vit_jax.inference import program as program_lib
from vit_jax.inference.agreement import (
    LEAST,
    Agreement,
    NotMeasured,
    model_inputs,
    of_first_split,
)
from vit_jax.inference.exports import FORMATS, Format, Run
from vit_jax.inference.predict import Predictor
from vit_jax.inference.preparation import Picture, as_pictures
from vit_jax.inference.program import OUTPUTS, WEIGHTS, Program
from vit_jax.plugins import check_known
from vit_jax.storage import is_remote, path_text
from vit_jax.tasks import BaseTask
from vit_jax.tracking.plain_text import code_span
from vit_jax.training.class_names import class_names
from vit_jax.training.workdir import Workdir

TOLERANCE = 1e-4
"""The largest difference of an output from the model's, over the largest value of the model's."""

ROUNDING = {"bfloat16": 0.05, "int8": 0.25}
"""The largest change of an output by rounded weights, over the largest value of the model's.

It refuses programs that rounding breaks. Outputs that are choices, such as label maps and the boxes
of the best scores, have no limit, because a small change of a score may flip a choice.
"""

_RUNS = 10


@dataclasses.dataclass(frozen=True)
class Exported:
    """The account of an export.

    Attributes:
      path: the folder.
      label: the format in words.
      size: bytes of the folder.
      difference: the largest difference of an output of the files, run in their own runtime on real
        images, from the model's; a share of the output's largest value.
      seconds: the median time of one batch of `rows` rows on this machine.
      rows: the number of rows of a batch that was timed.
      model_size, model_seconds: the same of the model in JAX, with weights in float32.
      rounding: the largest difference from the model with weights in float32, as a share; None if
        the weights are in float32.
      limit: the largest `rounding` that is not refused; None if there is no limit.
      agreement: for rounded weights, how often the most likely class is the model's; None if that
        was not measured.
      not_measured: the reason why the agreement of rounded weights was not measured.
    """

    path: str
    label: str
    size: int
    difference: float
    seconds: float
    rows: int
    model_size: int
    model_seconds: float
    rounding: float | None = None
    limit: float | None = None
    agreement: Agreement | None = None
    not_measured: str = ""

    def __str__(self) -> str:
        lines = [
            f"wrote {self.path}: {self.label}, {self.size / 1e6:.1f} MB (the model's weights:"
            f" {self.model_size / 1e6:.1f} MB)",
            f"its outputs differ from the model's by at most {self.difference:.1e} of their"
            " largest value",
            f"{1e3 * self.seconds:.1f} ms for {self.rows} row(s) on this machine (the model in JAX:"
            f" {1e3 * self.model_seconds:.1f} ms)",
        ]
        if self.rounding is not None:
            choices = "no limit, because the outputs are choices"
            limit = choices if self.limit is None else f"limit: {self.limit}"
            lines.insert(
                2,
                f"rounding the weights changes outputs by at most {self.rounding:.1e} of their"
                f" largest value ({limit})",
            )
            lines.append(str(self.agreement or f"agreement was not measured: {self.not_measured}"))
        return "\n".join(lines)


def export(
    model: Predictor | str | os.PathLike,
    path: str | os.PathLike,
    to: str = "stablehlo",
    *,
    outputs: str = "answers",
    include_preprocessing: bool = False,
    batch: int | None = None,
    weights: str = "float32",
    images: Iterable[Picture] = (),
    workdir: str | os.PathLike = "",
) -> Exported:
    """Writes a trained model as a program for another runtime, runs it there, and compares.

    Args:
      model: a predictor, or the path of a workdir or of a checkpoint in any format.
      path: the folder to make. A README.md in it has the lines that load the program.
      to: `stablehlo`, `savedmodel`, `onnx`, or `package.module:FORMAT` for a format of your own.
      outputs: "answers" are the task's (logits of classes or pixels, scores and boxes, vectors of
        images); "features" the embedding `[batch, dim]` before any head; "text" the vectors of
        texts, for a run that learned images with texts.
      include_preprocessing: takes pixels, uint8 `[batch, height, width, channels]` of the model's
        size, and answers as `predict` does, for example with probabilities. Otherwise the input is
        float32 and normalized, as README.md states, and the outputs are those of the model.
      batch: the number of rows; None lets any number in.
      weights: "float32"; "bfloat16" for half the size; or "int8" for a quarter, with a scale for
        each output of a kernel. The computation is in float32.
      images: the image files or pixels that the check runs on, of which it takes the first 64;
        without any, a photograph that ships with matplotlib.
      workdir: the run of the model, on whose first evaluation split programs with rounded weights
        are compared with it; not needed if `model` is its path.

    Raises:
      UserError: an argument is wrong, the model cannot be read, or a package is not installed.
      WrongExport: the outputs of the files are not those of the model, or rounded weights change
        them by more than `ROUNDING`, or int8 weights change the most likely class of more than 1 %
        of the split; nothing is left behind.
    """
    fmt = _installed_format(to)
    check_known(outputs, OUTPUTS, f"outputs={outputs}")
    check_known(weights, WEIGHTS, f"weights={weights}")
    rows = _rows(batch)
    shown = as_pictures(images)
    folder = _new_folder(path_text(path))
    name = "" if isinstance(model, Predictor) else path_text(model, "model")
    workdir = os.fspath(workdir or "") or (name if name and Workdir.at(name) else "")
    model = Predictor.open(model, headless=outputs == "features")
    _check_pixels(model.task, include_preprocessing)
    build = functools.partial(
        program_lib.build,
        model,
        outputs=outputs,
        include_preprocessing=include_preprocessing,
        batch=rows,
    )
    with _made_whole(folder) as unfinished:
        program = build(weights=weights)
        programs = program, program if weights == "float32" else build()
        done = _write_and_check(model, fmt, programs, unfinished, images=shown, workdir=workdir)
    return dataclasses.replace(done, path=os.path.expanduser(os.fspath(path)))


def _write_and_check(
    model: Predictor,
    fmt: Format,
    programs: tuple[Program, Program],
    folder: Path,
    *,
    images: Sequence[Picture],
    workdir: str,
) -> Exported:
    """Writes a program and its README.md into a folder, runs it, and returns the account.

    programs: the program, and the same with weights in float32.
    """
    program, exact = programs
    fmt.write(program, folder)
    run, inputs = fmt.open(folder), _inputs(model, program, images)
    difference = _difference(program, run, inputs, fmt.label)
    rounded: dict[str, Any] = {}
    if program.weights_as != "float32":
        rounded = _check_rounding(program, _largest_difference(exact(inputs), run(inputs)))
        rounded |= _agreement(workdir, model.task, run, programs)
    seconds, model_seconds = _time(run, inputs), _time(exact, inputs)
    (folder / "README.md").write_text(_readme(model, program, fmt), "utf-8", "backslashreplace")
    return Exported(
        str(folder),
        fmt.label,
        sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        difference,
        seconds,
        len(inputs),
        sum(array.nbytes for array in exact.weights.values()),
        model_seconds,
        **rounded,
    )


def _agreement(
    workdir: str, task: BaseTask, run: Run, programs: tuple[Program, Program]
) -> dict[str, Any]:
    """Returns the fields of `Exported` that tell the agreement, or why it was not measured."""
    if not workdir:
        return {"not_measured": "it needs a run, whose evaluation split has the images"}
    try:
        found = of_first_split(Workdir.existing(workdir).read_config(), task, run, *programs)
    except NotMeasured as error:
        return {"not_measured": str(error)}
    if programs[0].weights_as == "int8":
        check_agreement(found)
    return {"agreement": found}


def _check_rounding(program: Program, rounding: float) -> dict[str, Any]:
    """Returns the fields of `Exported` that tell what rounding changes.

    Raises:
      WrongExport: it changes an output by more than `ROUNDING`.
    """
    kinds = [output.dtype for output in program.outputs.values()]
    is_smooth = all(np.issubdtype(kind, np.floating) for kind in kinds)
    limit = ROUNDING[program.weights_as] if is_smooth else None
    if limit is not None and not rounding <= limit:
        raise WrongExport(
            f"rounding the weights to {program.weights_as} changes an output by {rounding:.1e} of"
            f" its largest value, more than {limit}; nothing was written; write weights=float32"
            " for weights that are not rounded"
        )
    return {"rounding": rounding, "limit": limit}


def check_agreement(found: Agreement) -> None:
    """Raises a `WrongExport` if int8 weights change the class of too many images."""
    if found.share < LEAST:
        raise WrongExport(
            f"{found}, less than {LEAST:.0%}; nothing was written; write"
            " weights=bfloat16 or float32"
        )


def _installed_format(to: str) -> Format:
    """Returns a format. Raises a `UserError` if its packages, of an extra, are not installed."""
    fmt: Format = FORMATS.find(to, "to")
    missing = [name for name in fmt.needs if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"to={to}: {' and '.join(missing)} is not installed for {sys.executable}; install the"
            f" extra {fmt.extra!r} of vit-jax"
        )
    return fmt


def _rows(batch: Any) -> int | None:
    is_number = isinstance(batch, int | np.integer) and not isinstance(batch, bool)
    if batch is not None and not (is_number and batch > 0):
        raise UserError(f"batch={quoted(batch)}: write a positive whole number")
    return batch if batch is None else int(batch)


def _new_folder(path: str) -> Path:
    if is_remote(path):
        raise UserError(f"cannot write {path}: name a folder on this machine, and copy it there")
    folder = Path(path).expanduser()
    with _naming(path):
        if os.path.lexists(folder):
            raise UserError(f"{path or '.'} exists already; name a folder that does not")
        if not folder.parent.is_dir():
            raise UserError(f"cannot write {path}: there is no folder {folder.parent}")
    return folder


@contextlib.contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Turns the error of a folder that cannot be made into a `UserError`."""
    try:
        yield
    except (OSError, ValueError) as error:  # A ValueError is raised for a null character.
        raise UserError(f"cannot write {quoted(os.fspath(path))}: {reason(error)}") from error


@contextlib.contextmanager
def _made_whole(folder: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes `folder` at the end, or goes if an error ends it."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    with _naming(folder):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
    try:
        yield unfinished
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _check_pixels(task: BaseTask, include_preprocessing: bool) -> None:
    if include_preprocessing and task.image_spec.dtype != np.uint8:
        raise UserError(
            "preprocessing cannot be included: this run's images are normalized in config.data.pp,"
            " which is no part of the model; export without it"
        )


def _inputs(predictor: Predictor, program: Program, images: Sequence[Picture]) -> np.ndarray:
    """Returns a batch of inputs: token numbers, or real images and their mirror images."""
    if program.name == "tokens":
        tower = models.text_tower_of(predictor.task.model)
        assert tower is not None
        shape = (3, *program.input.shape[1:])
        rows = np.random.default_rng(0).integers(0, tower.vocab_size, shape, np.int32)
    else:
        pictures = images or [Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg"]
        batch = next(iter(predictor.batches(pictures)))
        rows = batch["image"][batch["mask"] > 0]
        rows = np.concatenate([rows, rows[:, :, ::-1], rows[:, ::-1]])
    if program.batch is not None:
        rows = rows[np.arange(program.batch) % len(rows)]
    return rows if program.name == "tokens" else model_inputs(predictor.task, program, rows)


def _difference(program: Program, run: Run, inputs: np.ndarray, label: str) -> float:
    """Returns the largest difference of an output, as a share of its largest value.

    Raises:
      WrongExport: it exceeds `TOLERANCE`, or more than that share of whole numbers differ.
    """
    wanted, found = program(inputs), run(inputs)
    worst = 0.0
    for name, value in wanted.items():
        got = found.get(name)
        if got is None or got.shape != value.shape:
            raise WrongExport(f"{label}: output {name} is missing, or of another shape")
        off = _largest_difference({name: value}, found)
        if not off <= TOLERANCE:
            raise WrongExport(
                f"{label}: output {name} differs from the model's by {off:.1e} of its scale, more"
                f" than {TOLERANCE}; nothing was written"
            )
        worst = max(worst, off)
    return worst


def _largest_difference(wanted: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> float:
    """Returns the largest difference over the largest value, or the share of other integers."""
    differences = []
    for name, value in wanted.items():
        if np.issubdtype(value.dtype, np.floating):
            scale = max(float(np.abs(value).max()), 1e-12)
            differences.append(np.abs(found[name].astype(np.float64) - value).max() / scale)
        else:
            differences.append((found[name] != value).mean())
    return float(np.max(differences))


def _time(run: Run, inputs: np.ndarray) -> float:
    """Returns the median seconds of one call, after one call that is not counted."""
    run(inputs)
    seconds = []
    for _ in range(_RUNS):
        started = time.perf_counter()
        run(inputs)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _readme(predictor: Predictor, program: Program, fmt: Format) -> str:
    rows = "any number of rows" if program.batch is None else f"{program.batch} rows"
    shape = ", ".join(["n", *map(str, program.input.shape[1:])])
    outputs = [_described(name, x) for name, x in program.outputs.items()]
    names = class_names(predictor.task)
    parts = [
        f"# {fmt.label}",
        f"```python\n{fmt.usage.replace('INPUT', program.name)}```",
        f"`{program.name}`: {program.input.dtype.name} `[{shape}]`, {rows}: {program.meaning}.",
        "\n".join(["Outputs, by name:", "", *outputs]),
        _preprocessing(predictor, program),
    ]
    if names:
        lines = [f"{number}. {code_span(name)}" for number, name in enumerate(names)]
        parts.append("\n".join(["## Classes", "", *lines]))
    return "\n\n".join(filter(None, parts)) + "\n"


def _described(name: str, output: Any) -> str:
    shape = ", ".join(["n", *map(str, output.shape[1:])])
    return f"- `{name}`: {output.dtype.name} `[{shape}]`"


def _preprocessing(predictor: Predictor, program: Program) -> str:
    if program.name == "tokens":
        return ""
    lines = [f"## Preprocessing\n\nAn image file is {predictor.preparation.describe()}."]
    task = predictor.task
    if program.input.dtype != np.uint8 and predictor.task.image_spec.dtype == np.uint8:
        lines.append(
            f"Then `(pixel - mean) / std`, with mean {list(task.mean)} and std {list(task.std)} for"
            " pixels from 0 to 255."
        )
    elif program.input.dtype == np.uint8:
        lines.append("The program normalizes the pixels itself.")
    return " ".join(lines)
