"""Adds the recipes of `configs/` to the package; everything else is in setup.cfg."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["vit_jax*"]), "vit_jax.configs"],
    package_dir={"vit_jax.configs": "configs"},
)
