"""The pictures of the report: those of the task, and those of the model's attention.

A picture that fails is left out with a warning. Training has ended by then, and its outcome does
not change.
"""

import contextlib
import logging
from collections.abc import Iterator

import jax
from etils import epath

from vit_jax import report
from vit_jax.parallel import sharding
from vit_jax.report import Section, save_sections
from vit_jax.report.sections import read_sections
from vit_jax.tasks import BaseTask
from vit_jax.tracking.plain_text import one_line
from vit_jax.tracking.step_log import StepLog
from vit_jax.training import embeddings
from vit_jax.training.evaluate import Evaluator
from vit_jax.types import Params

logger = logging.getLogger(__name__)

NUM_ATTENTION_MAPS = 8
"""The number of examples whose attention is shown."""


def write_sections(
    workdir: epath.Path,
    evaluator: Evaluator,
    task: BaseTask,
    params: Params,
    log: StepLog,
    *,
    student: Params | None = None,
) -> None:
    """Draws the report's pictures for the final parameters; process 0 writes them.

    Every process must call this function, because predictions are computed on all devices.

    Args:
      student: the parameters that were trained, where `params` are those of their teacher.
    """
    sections: list[Section] = []
    with _surviving("the pictures of the report"):
        searched = embeddings.NUM_SEARCHED if evaluator.measures_features else 0
        limit = max(task.num_shown, searched)
        examples = evaluator.examples(evaluator.splits[0], params, limit)
        seen = {name: array[:searched] for name, array in examples.items()}
        examples = {name: array[: task.num_shown] for name, array in examples.items()}
        whole = _on_host(task, params)
        taught = None if student is None else _on_host(task, student)
        if jax.process_index() != 0:
            return
        with _surviving("the pictures of the task"):
            sections += task.sections(examples)
        with _surviving("the attention maps"):
            from vit_jax import attention  # matplotlib, which training can do without

            few = {name: array[:NUM_ATTENTION_MAPS] for name, array in examples.items()}
            inputs, titles = jax.device_get(task.inputs(few)), task.summaries(few)
            sections += attention.sections(task.model, whole, inputs, few["image"], titles)
            if taught is not None:
                sections += embeddings.student_section(task, taught, few)
        if searched:
            with _surviving("the pictures of features"):
                sections += embeddings.sections(task, whole, seen)
        save_sections(workdir, sections)
        drawn = {section.title for section in sections}
        for section in read_sections(workdir):
            if section.image and section.title in drawn:
                log.image(section.title, section.image)


def write_report(workdir: epath.Path) -> None:
    """Writes the report of a run that has just been finished."""
    with _surviving("the report"):
        report.write_report(workdir, is_done=True)


@contextlib.contextmanager
def _surviving(what: str) -> Iterator[None]:
    """Turns any exception in the block into a line of warning."""
    try:
        yield
    except Exception as error:
        reason = one_line(str(error), 300) or type(error).__name__
        logger.warning("%s could not be made: %s", what, reason)


def _on_host(task: BaseTask, params: Params) -> Params:
    """Returns the model's parameters as NumPy arrays, wherever their shards are.

    Those of a frozen teacher, for example, are not gathered.
    """
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    gather = jax.jit(task.inference_params, out_shardings=sharding.replicated(mesh))
    return jax.device_get(gather(params))
