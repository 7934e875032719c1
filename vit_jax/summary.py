"""What the report shows beyond curves: the task's pictures, and where the model looked."""

import jax
from etils import epath

from vit_jax import step
from vit_jax.evaluate import Evaluator
from vit_jax.report import save_sections
from vit_jax.tasks import TaskProtocol

MAX_EXAMPLES = 10_000
"""Examples of the first split that the pictures are drawn from."""


def write_sections(
    workdir: epath.Path, evaluator: Evaluator, task: TaskProtocol, state: step.State
) -> None:
    """Draws the report's pictures for the final state; process 0 writes them.

    Every process must call this, because predicting takes all devices.
    """
    params = state.params if state.ema is None else state.ema
    examples = evaluator.examples(evaluator.splits[0], params, MAX_EXAMPLES)
    if jax.process_index() == 0:
        save_sections(workdir, task.sections(examples))
