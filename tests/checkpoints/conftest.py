"""Modules that several tests of this folder share, and whole checkpoints."""

import pathlib
import shutil
import sys

import pytest

from vit_jax.checkpoints.store import Store

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from states import METADATA, mesh_of, tree


@pytest.fixture(scope="session")
def three_steps(tmp_path_factory):
    """A directory with whole checkpoints of steps 1, 2 and 3."""
    directory = tmp_path_factory.mktemp("checkpoints")
    store = Store(directory, keep_last=4)
    for step in (1, 2, 3):
        store.save(step, tree(mesh_of(2, 4), step), METADATA)
    store.close()
    return directory


@pytest.fixture
def copy(three_steps, tmp_path):
    return shutil.copytree(three_steps, tmp_path / "checkpoints")
