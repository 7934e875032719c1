"""Preparation of TFDS datasets for random access: download, build, convert, copy, check."""

from vit_jax.data.prepare.datasets import check, convert_tfrecord, copy, find_builder, prepare

__all__ = ["check", "convert_tfrecord", "copy", "find_builder", "prepare"]
