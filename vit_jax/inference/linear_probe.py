"""The linear classifiers of `vit_jax.training.linear_probe`, under their earlier name."""

from vit_jax.training.linear_probe import (
    MOMENTUM,
    RATES,
    Probes,
    appended,
    cosine,
    interleaved,
    sweep,
)

__all__ = ["MOMENTUM", "RATES", "Probes", "appended", "cosine", "interleaved", "sweep"]
