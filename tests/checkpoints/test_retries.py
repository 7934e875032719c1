"""Saves that storage refuses are tried again; then the run stops with the last good step."""

import itertools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils.epath import backend

from vit_jax.checkpoints.store import Store
from vit_jax.errors import CannotSave, UserError


def tree(step):
    return {"w": jnp.arange(8.0) * step}


def abstract(like):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)


@pytest.fixture
def failing_renames(monkeypatch):
    """`failing_renames(fails)`: the n-th rename of a checkpoint raises where `fails(n)`.

    It is the last thing that a save does: files that are written come before.
    """
    count = itertools.count(1)
    rename = backend._OsPathBackend.rename

    def make(fails):
        def sometimes(self, path, target):
            if Path(target).name.isdigit() and fails(next(count)):
                raise OSError(5, "Input/output error")
            return rename(self, path, target)

        monkeypatch.setattr(backend._OsPathBackend, "rename", sometimes)

    monkeypatch.setattr("vit_jax.checkpoints.store.RETRY_SECONDS", 0.01)
    return make


def test_storage_that_fails_every_third_write_loses_nothing(tmp_path, failing_renames, caplog):
    failing_renames(lambda number: number % 3 == 0)
    store = Store(tmp_path, keep_last=4)
    for step in range(1, 5):
        store.save(step, tree(step), {"at": step})
        store.wait()
        assert not store.must_retry()
    assert store.steps() == [1, 2, 3, 4]
    assert caplog.text.count("cannot save a checkpoint ([Errno 5] Input/output error)") == 1
    for step in store.steps():
        restored = store.restore(step, abstract(tree(step)))
        np.testing.assert_array_equal(restored.tree["w"], tree(step)["w"])
    store.close()


def test_a_failed_save_is_made_up_for_at_a_later_step(tmp_path, failing_renames):
    failing_renames(lambda number: number <= 1)
    store = Store(tmp_path)
    store.save(1, tree(1), {})
    deadline = time.monotonic() + 60
    while not store.must_retry():  # Found without waiting for the save.
        assert time.monotonic() < deadline
    assert store.steps() == []
    store.save(2, tree(2), {})
    store.wait()
    assert store.steps() == [2]
    store.close()


def test_storage_that_stays_broken_stops_with_the_last_good_step(tmp_path, failing_renames):
    failing_renames(lambda number: number > 1)
    store = Store(tmp_path, retries=2)
    store.save(1, tree(1), {})
    store.wait()
    store.save(2, tree(2), {})
    with pytest.raises(UserError, match="Input/output error; the last good one is step 1"):
        store.wait()


def test_one_of_several_processes_asks_to_be_started_again(tmp_path, monkeypatch):
    """The others know nothing of its failure, so it cannot try again with them."""
    store = Store(tmp_path, retries=2)
    store.save(1, tree(1), {})
    store.wait()
    with monkeypatch.context() as patched:
        patched.setattr(jax, "process_count", lambda: 2)
        with pytest.raises(CannotSave, match="last good one is step 1; start all again") as caught:
            store._failed(OSError(5, "Input/output error"))
    assert caught.value.exit_code == 75
    store.close()
