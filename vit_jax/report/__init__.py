"""What people look at: the metrics log, progress on the console, figures, the HTML report.

Importing this package is cheap, because the training loop does it: matplotlib and JAX load only
when a figure is drawn (`vit_jax.report.figures`).
"""

from vit_jax.report.console import Progress, format_duration
from vit_jax.report.html import write_report
from vit_jax.report.metrics import (
    WITHIN_TRAIN,
    MetricsWriter,
    headline,
    is_better,
    is_loss,
    read_metrics,
)
from vit_jax.report.sections import Section, save_sections

__all__ = [
    "WITHIN_TRAIN",
    "MetricsWriter",
    "Progress",
    "Section",
    "format_duration",
    "headline",
    "is_better",
    "is_loss",
    "read_metrics",
    "save_sections",
    "write_report",
]
