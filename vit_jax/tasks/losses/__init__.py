"""Losses of self-supervised pre-training, as functions of logits, vectors and masks.

All of them reduce over whole arrays, so that under `jax.jit` they are exact over the global batch,
on any mesh.
"""
