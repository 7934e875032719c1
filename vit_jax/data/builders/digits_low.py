"""The digits 0 to 4, as one half of a transfer task: see `configs/digits_transfer.py`."""

from vit_jax.data.builders import digits


class DigitsLow(digits.Digits):
    """`Digits` of 0 to 4 alone, in the same order and splits."""

    CLASSES = range(5)
