"""Export formats: one public module for each, with an object `FORMAT`.

A new format is one new file here. A format of somebody else is named `package.module:NAME`, where
`vit-jax export` and `vit_jax.export` take the name of a format.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vit_jax.inference.program import Program
from vit_jax.plugins import Kind

Run = Callable[[np.ndarray], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Format:
    """One export format.

    Attributes:
      label: the format in words, for messages.
      write: writes a program into an empty folder.
      open: returns a function of one batch that runs what `write` wrote, in the format's own
        runtime, with the program's outputs by name.
      usage: lines of Python that load and run the files, for people.
      needs: modules of other packages that `write` and `open` import.
      extra: the extra of this package that installs them.
    """

    label: str
    write: Callable[[Program, Path], None]
    open: Callable[[Path], Run]
    usage: str
    needs: tuple[str, ...] = ()
    extra: str = ""


FORMATS = Kind(
    "export format",
    __name__,
    attribute="FORMAT",
    form="package.module:FORMAT",
    accepts=lambda found: isinstance(found, Format),
)
"""The finder of formats by the name in `to`."""
