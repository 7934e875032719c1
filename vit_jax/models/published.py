"""The parameters of a model among all those that its run trains or keeps.

A run may train low-rank adapters (`models.lora`) beside the model, or keep a teacher that the
model imitates. What people evaluate, convert and export is the model alone, with the adapters
added into the kernels that they adapt.
"""

from collections.abc import Mapping

from vit_jax.models import lora
from vit_jax.types import Array

TEACHER = "teacher"
"""The name below which a run keeps the parameters of a teacher."""


def published_arrays(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Returns the arrays of the model alone, named as in a checkpoint, with "/" between parts."""
    own = {name: x for name, x in arrays.items() if not name.startswith(f"{TEACHER}/")}
    return lora.merge_named(own)
