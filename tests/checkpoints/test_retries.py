"""Saves that storage refuses are tried again; then the run stops with the last good step."""

import errno
import itertools
import os
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
    """Two retries are three tries."""
    tries = []
    failing_renames(lambda number: tries.append(number) or number > 1)
    store = Store(tmp_path, retries=2)
    store.save(1, tree(1), {})
    store.wait()
    store.save(2, tree(2), {})
    with pytest.raises(UserError, match="Input/output error; the last good one is step 1"):
        store.wait()
    assert tries == [1, 2, 3, 4]


class Storage:
    """Counts what changes files, and makes the n-th call fail, or all from the n-th on."""

    CALLS = ("makedirs", "mkdir", "open", "remove", "rename", "replace", "rmtree")

    def __init__(self, monkeypatch):
        self.disarm()
        for name in self.CALLS:
            call = getattr(backend._OsPathBackend, name)
            monkeypatch.setattr(backend._OsPathBackend, name, self._watched(name, call))

    def arm(self, point, code, *, lasts):
        self.point, self.error, self.lasts, self.count = point, code, lasts, 0

    def disarm(self):
        self.arm(0, 0, lasts=False)

    def _watched(self, name, call):
        def watched(backend, path, *args, **kwargs):
            if name != "open" or "w" in (*args, kwargs.get("mode")):
                self.count += 1
                is_after = self.lasts and self.count > self.point
                if self.point and (self.count == self.point or is_after):
                    raise OSError(self.error, os.strerror(self.error), str(path))
            return call(backend, path, *args, **kwargs)

        return watched


@pytest.fixture
def storage(monkeypatch):
    monkeypatch.setattr("vit_jax.checkpoints.store.RETRY_SECONDS", 0.01)
    return Storage(monkeypatch)


def check_failure(storage, folder, point, code, *, lasts):
    """Saves a step while storage fails; what comes back is the last step that was saved."""
    with Store(folder, keep_last=2) as store:
        for step in (1, 2):
            store.save(step, tree(step), {"at": step})
            store.wait()
        storage.arm(point, code, lasts=lasts)
        failed = None
        try:
            store.save(3, tree(3), {"at": 3})
            store.wait()
        except UserError as error:
            failed = error
        happened = storage.count >= point
        storage.disarm()
    assert lasts or not failed
    if failed:
        assert "the last good one is step 2" in str(failed)
    newest = 2 if failed else 3
    with Store(folder, keep_last=2) as store:
        restored = store.restore_newest(abstract(tree(3)))
        assert (restored.step, restored.metadata) == (newest, {"at": newest})
        assert not restored.damaged
        np.testing.assert_array_equal(restored.tree["w"], tree(newest)["w"])
        store.save(4, tree(4), {"at": 4})
        store.wait()
    assert store.steps()[-1] == 4
    assert not [path for path in folder.iterdir() if "tmp" in path.name]
    return happened


@pytest.mark.parametrize("lasts", [False, True])
@pytest.mark.parametrize("point", [1, 4, 9, 14, 18])
def test_storage_that_fails_at_any_point_of_a_save_loses_no_step(tmp_path, storage, point, lasts):
    assert check_failure(storage, tmp_path, point, errno.EIO, lasts=lasts)


@pytest.mark.soak
@pytest.mark.parametrize("lasts", [False, True])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_storage_that_fails_at_every_point_of_a_save(tmp_path, storage, code, lasts):
    points = 0
    while check_failure(storage, tmp_path / str(points), points + 1, code, lasts=lasts):
        points += 1
    assert points >= 15


def test_the_error_that_ends_a_run_is_told_and_not_that_of_its_last_save(
    tmp_path, failing_renames, caplog
):
    failing_renames(lambda _: True)

    def run():
        with Store(tmp_path) as store:
            store.save(1, tree(1), {})
            raise UserError("cannot write the metrics")

    with pytest.raises(UserError, match="cannot write the metrics"):
        run()
    assert "cannot save a checkpoint" in caplog.text


def test_a_last_save_that_fails_is_told_when_the_store_is_closed(tmp_path, failing_renames):
    failing_renames(lambda _: True)
    store = Store(tmp_path)
    store.save(1, tree(1), {})
    with pytest.raises(UserError, match=r"cannot save a checkpoint .* none is saved"):
        store.close()
    store.close()


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
