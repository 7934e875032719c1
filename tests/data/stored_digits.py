"""The digits that we ship, prepared as a TFDS dataset."""

from vit_jax.data import open_source

NUM_TRAIN = 1437


def open_digits(data_dir, split="train"):
    """Opens them as a source."""
    return open_source({"source": "tfds", "name": "digits", "dir": data_dir, "split": split})
