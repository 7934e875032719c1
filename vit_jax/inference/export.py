"""Exports a trained model as a program for other runtimes, and checks what was written."""

import contextlib
import dataclasses
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np

from vit_jax import models
from vit_jax.errors import UserError, WrongExport
from vit_jax.inference import program as program_lib
from vit_jax.inference.exports import FORMATS, Format, Run
from vit_jax.inference.predict import Predictor
from vit_jax.inference.preparation import Picture
from vit_jax.inference.program import OUTPUTS, WEIGHTS, Program
from vit_jax.plugins import check_known
from vit_jax.tasks import BaseTask
from vit_jax.tracking.plain_text import one_line

TOLERANCE = 1e-4
"""The largest difference of an output from the model's, over the largest value of the model's."""

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
    """

    path: str
    label: str
    size: int
    difference: float
    seconds: float
    rows: int

    def __str__(self) -> str:
        return (
            f"wrote {self.path}: {self.label}, {self.size / 1e6:.1f} MB\n"
            f"its outputs differ from the model's by at most {self.difference:.1e} of their scale\n"
            f"{1e3 * self.seconds:.1f} ms for {self.rows} row(s) on this machine"
        )


def export(
    model: Predictor | str,
    path: str,
    to: str = "stablehlo",
    *,
    outputs: str = "answers",
    include_preprocessing: bool = False,
    batch: int | None = None,
    weights: str = "float32",
    images: Sequence[Picture] = (),
) -> Exported:
    """Writes a trained model as a program for another runtime, runs it there, and compares.

    Args:
      model: a predictor, or the path of a workdir or of a checkpoint in any format.
      path: the folder to make. A README.md in it has the lines that load the program.
      to: `stablehlo`, `savedmodel`, or `package.module:FORMAT` for a format of your own.
      outputs: "answers" are the task's (logits of classes or pixels, scores and boxes, vectors of
        images); "features" the embedding `[batch, dim]` before any head; "text" the vectors of
        texts, for a run that learned images with texts.
      include_preprocessing: takes pixels, uint8 `[batch, height, width, channels]` of the model's
        size, and answers as `predict` does, for example with probabilities. Otherwise the input is
        float32 and normalized, as README.md states, and the outputs are those of the model.
      batch: the number of rows; None lets any number in.
      weights: "float32", or "bfloat16" for half the size. The computation is in float32.
      images: the image files or pixels that the check runs on, of which it takes the first 64;
        without any, a photograph that ships with matplotlib.

    Raises:
      UserError: the model cannot be read or has no such outputs, or the folder cannot be made.
      WrongExport: the outputs of the files are not those of the model; nothing is left behind.
    """
    fmt: Format = FORMATS.find(to, "--to")
    check_known(outputs, OUTPUTS, f"--outputs={outputs}")
    check_known(weights, WEIGHTS, f"--weights={weights}")
    folder = _new_folder(path)
    headless = outputs == "features"
    predictor = Predictor.open(model, headless=headless) if isinstance(model, str) else model
    _check_pixels(predictor.task, include_preprocessing)
    program = program_lib.build(
        predictor,
        outputs=outputs,
        include_preprocessing=include_preprocessing,
        batch=batch,
        weights=weights,
    )
    with _made_whole(folder) as unfinished:
        fmt.write(program, unfinished)
        run = fmt.open(unfinished)
        inputs = _inputs(predictor, program, images)
        difference = _difference(program, run, inputs, fmt.label)
        seconds, rows = _time(run, inputs[: program.batch or 1])
        readme = _readme(predictor, program, fmt)
        (unfinished / "README.md").write_text(readme, encoding="utf-8")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Exported(path, fmt.label, size, difference, seconds, rows)


def _new_folder(path: str) -> Path:
    folder = Path(path)
    if folder.exists():
        raise UserError(f"{path} exists already; name a folder that does not")
    if not folder.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {folder.parent}")
    return folder


@contextlib.contextmanager
def _made_whole(folder: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes `folder` at the end, or goes if an error ends it."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
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
            "--include-preprocessing: this run's images are normalized in config.data.pp, which is"
            " no part of the model; export without it"
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
        batch = next(iter(predictor.batches(list(pictures))))
        rows = batch["image"][batch["mask"] > 0]
        rows = np.concatenate([rows, rows[:, :, ::-1], rows[:, ::-1]])
    if program.batch is not None:
        rows = rows[np.arange(program.batch) % len(rows)]
    if program.name == "tokens" or program.input.dtype == np.uint8:
        return rows
    return np.asarray(jax.device_get(predictor.task.inputs({"image": rows})), np.float32)


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
        if np.issubdtype(value.dtype, np.floating):
            scale = max(float(np.abs(value).max()), 1e-12)
            off = float(np.abs(got.astype(np.float64) - value).max()) / scale
        else:
            off = float((got != value).mean())
        worst = max(worst, off)
        if not off <= TOLERANCE:
            raise WrongExport(
                f"{label}: output {name} differs from the model's by {off:.1e} of its scale, more"
                f" than {TOLERANCE}; nothing was written"
            )
    return worst


def _time(run: Run, inputs: np.ndarray) -> tuple[float, int]:
    """Returns (median seconds of one call, rows), after one call that is not counted."""
    run(inputs)
    seconds = []
    for _ in range(_RUNS):
        started = time.perf_counter()
        run(inputs)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), len(inputs)


def _readme(predictor: Predictor, program: Program, fmt: Format) -> str:
    rows = "any number of rows" if program.batch is None else f"{program.batch} rows"
    shape = ", ".join(["n", *map(str, program.input.shape[1:])])
    outputs = [_described(name, x) for name, x in program.outputs.items()]
    names = predictor.info.class_names
    parts = [
        f"# {fmt.label}",
        f"```python\n{fmt.usage.replace('INPUT', program.name)}```",
        f"`{program.name}`: {program.input.dtype.name} `[{shape}]`, {rows}: {program.meaning}.",
        "\n".join(["Outputs, by name:", "", *outputs]),
        _preprocessing(predictor, program),
    ]
    if names:
        parts.append(
            "## Classes\n\n" + "\n".join(f"{i}. {one_line(one)}" for i, one in enumerate(names))
        )
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
