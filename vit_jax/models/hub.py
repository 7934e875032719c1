"""Models by their names on the Hugging Face hub, such as `facebook/dinov2-base`.

Each name stands for the fields of `VisionTransformer` that its published config describes, so that
a run can be configured without the files of the model. `scripts/hub_names.py` writes the table
`hub_names.json` with the classes of transformers and open_clip, whose versions it states.
"""

import json
from collections.abc import Iterator
from importlib import resources
from typing import Any

from vit_jax.models.registry import Variant
from vit_jax.models.vit import VisionTransformer


def _fields(row: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        yield name, tuple(value) if isinstance(value, list) else value


_TABLE = json.loads(resources.files("vit_jax.models").joinpath("hub_names.json").read_text())

VARIANTS = {
    name: Variant(VisionTransformer, dict(_fields(row)), input_size=None)
    for name, row in _TABLE["models"].items()
}
