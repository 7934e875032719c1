"""Selection of the model's own parameters from all parameters of a run.

In addition to the model, a run may train low-rank adapters (`models.lora`) or keep a teacher for
distillation. Evaluation, conversion, and export use the model alone, with the adapters merged into
the kernels that they adapt. Where a task's own state has a teacher that follows the student, the
teacher is evaluated and published in the place of the student.
"""

from collections.abc import Mapping

from vit_jax.models import lora
from vit_jax.types import Numbers, Params

TEACHER = "teacher"
"""The prefix of the names of a teacher's parameters, among the parameters or in a task's state."""


def teacher_of(task_state: Params | None) -> Params | None:
    """Returns the parameters of the teacher in a task's own state; None if it has no teacher."""
    return (task_state or {}).get(TEACHER)


def published_arrays(arrays: Mapping[str, Numbers]) -> dict[str, Numbers]:
    """Returns the arrays of the model alone, named as in a checkpoint, with "/" between parts."""
    own = {name: x for name, x in arrays.items() if not name.startswith(f"{TEACHER}/")}
    return lora.merge_named(own)
