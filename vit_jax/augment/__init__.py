"""Augmentation on the device, for any task: distortion, mixing, erasing, RandAugment.

`spec.Augmentation` is all of it as one object.
"""
