"""What a run records while it trains: the metrics log, its writers, progress on the console.

Importing this package is cheap, because the training loop does it: no JAX, no matplotlib.
"""

from vit_jax.tracking.console import Progress, format_duration
from vit_jax.tracking.metrics import (
    WITHIN_TRAIN,
    MetricsWriter,
    headline,
    is_better,
    is_loss,
    read_metrics,
)

__all__ = [
    "WITHIN_TRAIN",
    "MetricsWriter",
    "Progress",
    "format_duration",
    "headline",
    "is_better",
    "is_loss",
    "read_metrics",
]
