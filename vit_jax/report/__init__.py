"""What people look at: the metrics log, progress on the console, figures, the HTML report.

Importing this package is cheap, because the training loop does it: matplotlib and JAX load only
when a figure is drawn.
"""

from vit_jax.report.console import Progress, format_duration
from vit_jax.report.metrics import MetricsWriter, read_metrics

__all__ = ["MetricsWriter", "Progress", "format_duration", "read_metrics"]
