"""What a run records while it trains: the metrics log, its writers, progress on the console.

Importing this package is cheap, because the training loop does it: no JAX, no matplotlib.
"""

from vit_jax.tracking.console import Progress, format_duration
from vit_jax.tracking.log import MetricsLog
from vit_jax.tracking.metrics import WITHIN_TRAIN, Metric, headline
from vit_jax.tracking.rows import read_metrics

__all__ = [
    "WITHIN_TRAIN",
    "Metric",
    "MetricsLog",
    "Progress",
    "format_duration",
    "headline",
    "read_metrics",
]
