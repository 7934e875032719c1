"""Writes vit_jax/models/counts.json: the parameters and operations of every model with a name.

    python scripts/model_counts.py            # takes many minutes

Counting traces each model, so `models` prints what is stored. Names of models that this package
has not are left out.
"""

import json
import pathlib
import sys

from vit_jax.errors import UserError
from vit_jax.models import build, listing

PATH = pathlib.Path(listing.__file__).with_name("counts.json")


def counts() -> dict[str, tuple[int, int]]:
    """Returns (parameters, operations of a forward pass) by name."""
    found, by_model = {}, {}
    for name, size in listing.sizes().items():
        try:
            model = repr(build(name, num_classes=size.num_classes)), size.input_size
            if model not in by_model:
                by_model[model] = listing.traced_counts(name, size)
            found[name] = by_model[model]
        except UserError as error:
            print(error, file=sys.stderr)
    return found


if __name__ == "__main__":
    rows = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(counts().items())]
    PATH.write_text("{\n" + ",\n".join(rows) + "\n}\n")
