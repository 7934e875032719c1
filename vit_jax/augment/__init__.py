"""Augmentation on the device, for any task: distortion, mixing, erasing, RandAugment."""
