"""The pictures of the report: those of the task, and attention maps."""

import jax
from etils import epath

from vit_jax import attention
from vit_jax.parallel import sharding
from vit_jax.report import save_sections
from vit_jax.tasks import BaseTask
from vit_jax.training.evaluate import Evaluator
from vit_jax.types import Params

NUM_ATTENTION_MAPS = 8
"""The number of examples whose attention is shown."""


def write_sections(
    workdir: epath.Path, evaluator: Evaluator, task: BaseTask, params: Params
) -> None:
    """Draws the report's pictures for the final parameters; process 0 writes them.

    Every process must call this function, because predictions are computed on all devices.
    """
    examples = evaluator.examples(evaluator.splits[0], params, task.num_shown)
    whole = task.inference_params(_on_host(params))
    if jax.process_index() == 0:
        few = {name: array[:NUM_ATTENTION_MAPS] for name, array in examples.items()}
        inside = attention.sections(
            task.model, whole, jax.device_get(task.inputs(few)), few["image"], task.summaries(few)
        )
        save_sections(workdir, [*task.sections(examples), *inside])


def _on_host(params: Params) -> Params:
    """Returns all parameters as NumPy arrays, wherever their shards are."""
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    gather = jax.jit(lambda tree: tree, out_shardings=sharding.replicated(mesh))
    return jax.device_get(gather(params))
