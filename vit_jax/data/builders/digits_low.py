"""The digits 0 to 4, one half of a transfer task: see `configs/digits_transfer.py`."""

from vit_jax.data.builders import digits


class DigitsLow(digits.Digits):
    """The digits 0 to 4 of `Digits`, in the same order and splits."""

    CLASSES = range(5)
