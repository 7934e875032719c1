"""The digits 5 to 9, as one half of a transfer task: see `configs/digits_transfer.py`."""

from vit_jax.data.builders import digits


class DigitsHigh(digits.Digits):
    """`Digits` of 5 to 9 alone, in the same order and splits."""

    CLASSES = range(5, 10)
