"""Measures how often a program with rounded weights gives the class that the model gives."""

import dataclasses

import jax
import numpy as np
from ml_collections import ConfigDict

from vit_jax import data
from vit_jax.errors import UserError
from vit_jax.inference.exports import Run
from vit_jax.inference.program import Program
from vit_jax.tasks import BaseTask
from vit_jax.training.evaluate import open_first_split

LEAST = 0.99
"""The least share of a split on which a program with int8 weights agrees with its model."""

_SCORES = ("logits", "probability")


class NotMeasured(Exception):
    """The agreement of a program cannot be measured. The message is the reason."""


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The number of images of a split whose most likely class is the model's."""

    same: int
    total: int
    split: str

    @property
    def share(self) -> float:
        """The fraction of the images."""
        return self.same / self.total

    def __str__(self) -> str:
        return (
            f"its most likely class is the float32 model's for {self.same} of {self.total} images"
            f" of {self.split!r} ({self.share:.2%})"
        )


def model_inputs(task: BaseTask, program: Program, pixels: np.ndarray) -> np.ndarray:
    """Returns a batch of prepared images as the program takes them: pixels, or normalized."""
    if program.input.dtype == np.uint8:
        return pixels
    return np.asarray(jax.device_get(task.inputs({"image": pixels})), np.float32)


def of_first_split(
    config: ConfigDict, task: BaseTask, run: Run, program: Program, model: Program
) -> Agreement:
    """Returns the agreement on the first evaluation split of a run.

    Args:
      config: that of the run.
      task: its task, which normalizes images.
      run: runs the written program.
      program: the program that was written.
      model: the same program with weights in float32.

    Raises:
      NotMeasured: the outputs are no scores of classes, or the run has no evaluation split, or its
        data cannot be opened.
    """
    names = [name for name in _SCORES if name in program.outputs]
    if not names or len(program.outputs[names[0]].shape) != 2:
        raise NotMeasured("the outputs are no scores of classes")
    try:
        split = open_first_split(config)
    except UserError as error:
        raise NotMeasured(str(error)) from error
    size = program.batch or config.eval.batch_size or config.batch_size
    same = total = 0
    with data.eval_batches(
        split.source,
        batch_size=size,
        rows=np.arange(size),
        pp=split.pp,
        num_threads=config.data.threads,
    ) as batches:
        for batch in batches:
            inputs = model_inputs(task, program, batch["image"])
            both = [call(inputs)[names[0]].argmax(1) for call in (run, model)]
            real = batch["mask"] > 0
            same += int((both[0] == both[1])[real].sum())
            total += int(real.sum())
    return Agreement(same, total, split.name)
