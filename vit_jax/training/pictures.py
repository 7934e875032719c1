"""What the report shows beyond curves: the task's pictures, and where the model looked."""

import jax
from etils import epath

from vit_jax import attention
from vit_jax.parallel import sharding
from vit_jax.report import save_sections
from vit_jax.tasks import BaseTask
from vit_jax.training.evaluate import Evaluator
from vit_jax.types import Params

LOOKED_INTO = 8
"""Examples whose attention is shown."""


def write_sections(
    workdir: epath.Path, evaluator: Evaluator, task: BaseTask, params: Params
) -> None:
    """Draws the report's pictures for the final parameters; process 0 writes them.

    Every process must call this, because predicting takes all devices.
    """
    examples = evaluator.examples(evaluator.splits[0], params, task.num_shown)
    whole = task.inference_params(_on_host(params))
    if jax.process_index() == 0:
        few = {name: array[:LOOKED_INTO] for name, array in examples.items()}
        inside = attention.sections(
            task.model, whole, jax.device_get(task.inputs(few)), few["image"], task.summaries(few)
        )
        save_sections(workdir, [*task.sections(examples), *inside])


def _on_host(params: Params) -> Params:
    """All parameters as NumPy arrays, wherever their shards are."""
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    gather = jax.jit(lambda tree: tree, out_shardings=sharding.replicated(mesh))
    return jax.device_get(gather(params))
