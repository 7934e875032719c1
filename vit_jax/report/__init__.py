"""The HTML page of a run, its figures and pictures.

Importing this package is cheap: matplotlib and JAX load only when a figure is drawn
(`vit_jax.report.figures`).
"""

from vit_jax.report.comparison import write_comparison
from vit_jax.report.html import write_report
from vit_jax.report.sections import Section, save_sections

__all__ = ["Section", "save_sections", "write_comparison", "write_report"]
