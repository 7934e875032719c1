"""One training in a workdir at a time; a lock that was left behind stops nobody."""

import configparser
import dataclasses
import errno
import json
import os
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from etils import epath

from vit_jax import storage
from vit_jax.errors import UserError
from vit_jax.training import lock
from vit_jax.training.lock import FILE, Holder, WorkdirLock


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.4)
    monkeypatch.setattr(lock, "_WATCH_SECONDS", 0.02)
    monkeypatch.setattr(lock, "_SETTLE_SECONDS", 0.05)


def leave(folder, **changes):
    """Writes the lock of another process."""
    holder = dataclasses.replace(Holder.current(), **changes)
    (folder / FILE).write_text(json.dumps(dataclasses.asdict(holder)))
    return holder


def ended_process():
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_the_second_of_two_is_told_who_holds_the_lock(folder):
    words = rf"in use by process {os.getpid()} on .* began at 20"
    with WorkdirLock(folder), pytest.raises(UserError, match=words):
        WorkdirLock(folder).__enter__()
    with WorkdirLock(folder):  # Free again.
        pass
    assert list(folder.iterdir()) == []


def test_only_the_first_process_of_a_run_takes_it(folder):
    with WorkdirLock(folder), WorkdirLock(folder, is_holder=False) as other:
        other.check()


def test_a_lock_of_a_dead_process_is_taken_over_at_once(folder, monkeypatch):
    monkeypatch.setattr(lock, "STALE_SECONDS", 1e6)
    leave(folder, pid=ended_process())
    with WorkdirLock(folder) as held:
        held.check()


def test_a_number_of_a_process_that_is_reused_does_not_hold_the_lock(folder, monkeypatch):
    monkeypatch.setattr(lock, "STALE_SECONDS", 1e6)
    leave(folder, birth="1")
    with WorkdirLock(folder) as held:
        held.check()


@pytest.mark.parametrize("changes", [{"host": "elsewhere", "scope": "elsewhere"}, {"scope": ""}])
def test_a_silent_lock_of_another_host_is_taken_over_after_a_while(folder, changes, caplog):
    leave(folder, **changes)
    with WorkdirLock(folder) as held:
        held.check()
    assert "waiting 0.4 s" in caplog.text


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"key": 3}', "\x00\x01"])
def test_a_broken_lock_is_taken_over_after_a_while(folder, content):
    (folder / FILE).write_text(content)
    with WorkdirLock(folder) as held:
        held.check()


def test_a_beating_lock_of_another_host_is_not_taken(folder):
    holder = leave(folder, host="elsewhere", scope="elsewhere")
    stop = threading.Event()

    def beat():
        count = 0
        while not stop.wait(0.05):
            count += 1
            changed = dataclasses.asdict(dataclasses.replace(holder, beat=count))
            storage.write_atomically(folder / FILE, json.dumps(changed).encode())

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="on elsewhere"):
            WorkdirLock(folder).__enter__()
    finally:
        stop.set()
        thread.join()


def test_a_holder_on_a_full_disk_keeps_its_lock(folder, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with WorkdirLock(folder):
        monkeypatch.setattr(storage, "write_atomically", full)
        monkeypatch.setattr(Holder, "is_gone", lambda _: None)  # As another host sees it.
        with pytest.raises(UserError, match="in use by"):
            WorkdirLock(folder).__enter__()


def test_the_holder_rewrites_its_lock(folder):
    with WorkdirLock(folder):
        for _ in range(200):
            if Holder.parse((folder / FILE).read_text()).beat >= 2:
                return
            threading.Event().wait(0.02)
    raise AssertionError("no beat")


def test_a_holder_learns_that_its_workdir_is_gone(folder):
    with WorkdirLock(folder) as held:
        (folder / FILE).unlink()
        with pytest.raises(UserError, match="was moved, deleted or unmounted"):
            held.check()


def test_a_holder_learns_that_another_took_over_and_leaves_its_lock(folder):
    with WorkdirLock(folder) as held:
        leave(folder, host="elsewhere")
        with pytest.raises(UserError, match=r"taken over by process \d+ on elsewhere"):
            held.check()
    assert (folder / FILE).exists()


@pytest.mark.parametrize("is_left", [False, True])
def test_of_many_at_the_same_moment_one_gets_the_lock(folder, is_left):
    pid = ended_process()
    for _ in range(20):
        if is_left:
            leave(folder, pid=pid)
        start = threading.Barrier(4)

        def take(_, start=start):
            held = WorkdirLock(folder)
            start.wait()
            try:
                return held.__enter__()
            except UserError:
                return None

        with ThreadPoolExecutor(4) as pool:
            holders = [held for held in pool.map(take, range(4)) if held]
        assert len(holders) == 1
        holders[0].check()
        holders[0].__exit__()
        assert not (folder / FILE).exists()


def test_on_an_object_store_the_lock_is_kept_too(folder, monkeypatch):
    monkeypatch.setattr(storage, "is_remote", lambda _: True)
    with WorkdirLock(folder) as held:
        held.check()
        with pytest.raises(UserError, match="in use"):
            WorkdirLock(folder).__enter__()
    leave(folder, pid=ended_process())
    with WorkdirLock(folder) as held:
        held.check()


def test_on_an_object_store_the_last_of_two_writers_has_the_lock(folder, monkeypatch, caplog):
    """Both have seen no lock; the first finds the other's when it looks again."""
    monkeypatch.setattr(storage, "is_remote", lambda _: True)
    monkeypatch.setattr(storage, "create", lambda *_: None)  # A store without conditional writes.
    write = storage.write_atomically

    def both(path, content):
        write(path, content)
        leave(folder, host="elsewhere")

    monkeypatch.setattr(storage, "write_atomically", both)
    with pytest.raises(UserError, match=r"in use by .* on elsewhere"):
        WorkdirLock(folder).__enter__()
    (warned,) = [line for line in caplog.messages if "conditional" in line]
    assert warned.startswith(f"{folder}/LOCK: no conditional write")


def test_a_clock_that_is_set_back_changes_nothing(folder, monkeypatch):
    with WorkdirLock(folder) as held:
        monkeypatch.setattr("time.time", lambda: 0.0)
        held.check()
        with pytest.raises(UserError, match="in use"):
            WorkdirLock(folder).__enter__()
    leave(folder, scope="elsewhere")
    with WorkdirLock(folder) as held:
        held.check()


def test_a_beat_during_the_import_of_tensorflow_knows_its_errors(monkeypatch):
    """The module is in `sys.modules` before it has its names."""
    monkeypatch.setitem(sys.modules, "tensorflow", types.ModuleType("tensorflow"))
    assert storage.errors() == (OSError,)


def test_an_object_store_creates_a_lock_by_a_conditional_write():
    path = "memory://bucket/run/LOCK"
    assert storage.create(path, b"first") is True
    assert storage.create(path, b"second") is False
    assert fsspec.filesystem("memory").cat("/bucket/run/LOCK") == b"first"
    assert storage.create("nothing://bucket/LOCK", b"") is None


@pytest.mark.parametrize(
    ("address", "package"), [("gs://b/LOCK", "gcsfs"), ("s3://b/LOCK", "s3fs")]
)
def test_an_extra_has_what_a_store_needs_to_create_a_file(address, package):
    advice = storage.how_to_create(address)
    extra = advice.split("'")[1]
    declared = configparser.ConfigParser()
    declared.read(Path(__file__).parents[2] / "setup.cfg")
    assert declared["options.extras_require"][extra].strip() == package
    assert advice.startswith(f"install or update {package} ")
    assert storage.how_to_create("other://b/LOCK") == ""
