import pathlib
import sys

import jax
import pytest

# The trees of the reference files are shared by several test modules of this folder, and the
# reader of sampled arrays by several folders.
HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "golden")]


@pytest.fixture(autouse=True)
def compile_quickly():
    """These tests compile much and compute little."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
