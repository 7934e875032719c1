"""The input pipeline: reads, preprocesses, and batches images in host memory.

    source (random access) -> sampling (which example, which seed) -> pipeline (decode, augment)

A training batch is a pure function of (seed, step): never of the number of processes, threads,
restarts, or of how the rows of the batch are spread over a mesh. Importing this package does not
import TensorFlow; only sources that read TFDS and non-empty preprocessing strings do.
"""

from vit_jax.data.expected import Expected, expect
from vit_jax.data.pipeline import (
    Batches,
    element_spec,
    eval_batches,
    num_eval_batches,
    train_batches,
)
from vit_jax.data.pp import check_moves, vocabularies
from vit_jax.data.sources import Source, class_counts, open_source
from vit_jax.data.sources._balanced import balanced

__all__ = [
    "Batches",
    "Expected",
    "Source",
    "balanced",
    "check_moves",
    "class_counts",
    "element_spec",
    "eval_batches",
    "expect",
    "num_eval_batches",
    "open_source",
    "train_batches",
    "vocabularies",
]
