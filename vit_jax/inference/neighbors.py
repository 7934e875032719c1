"""The nearest neighbors of `vit_jax.training.neighbors`, under their earlier name."""

from vit_jax.training.neighbors import NEIGHBORS, TEMPERATURE, Labelled, accuracy, neighbor_votes

__all__ = ["NEIGHBORS", "TEMPERATURE", "Labelled", "accuracy", "neighbor_votes"]
