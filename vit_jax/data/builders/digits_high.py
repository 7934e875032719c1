"""The digits 5 to 9, one half of a transfer task: see `configs/digits_transfer.py`."""

from vit_jax.data.builders import digits


class DigitsHigh(digits.Digits):
    """The digits 5 to 9 of `Digits`, in the same order and splits."""

    CLASSES = range(5, 10)
