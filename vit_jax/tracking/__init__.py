"""Records of a run in progress: the metrics log, its writers, and progress on the console.

The training loop imports this package, so it imports neither JAX nor matplotlib.
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
