"""What a run records while it trains: the metrics log, its writers, progress on the console.

Importing this package is cheap, because the training loop does it: no JAX, no matplotlib.
"""

from vit_jax.tracking.console import Progress, format_duration
from vit_jax.tracking.log import WITHIN_TRAIN, MetricsWriter, read_metrics
from vit_jax.tracking.metrics import Metric, headline

__all__ = [
    "WITHIN_TRAIN",
    "Metric",
    "MetricsWriter",
    "Progress",
    "format_duration",
    "headline",
    "read_metrics",
]
