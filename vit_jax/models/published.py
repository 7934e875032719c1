"""Selection of the model's own parameters from all parameters of a run.

In addition to the model, a run may train low-rank adapters (`models.lora`) or keep a teacher for
distillation. Evaluation, conversion, and export use the model alone, with the adapters merged into
the kernels that they adapt.
"""

from collections.abc import Mapping

from vit_jax.models import lora
from vit_jax.types import Array

TEACHER = "teacher"
"""The prefix of the names of a teacher's parameters."""


def published_arrays(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Returns the arrays of the model alone, named as in a checkpoint, with "/" between parts."""
    own = {name: x for name, x in arrays.items() if not name.startswith(f"{TEACHER}/")}
    return lora.merge_named(own)
