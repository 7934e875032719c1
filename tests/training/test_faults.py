"""Kills, signals and broken storage: a finished run equals the undisturbed one, bit for bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import warm

TINY = Path(__file__).parents[1] / "tiny.py"
STEPS = 24


def command(workdir, npz, *overrides):
    return [
        "train", f"--config={TINY}:npz={npz},steps={STEPS},full=True",
        f"--workdir={workdir}", "--config.checkpoint.every=2", "--config.eval.every=8", *overrides,
    ]  # fmt: skip


# One device: the programs are smaller and a process reaches its first step sooner.
def environment(**more):
    return {
        **os.environ,
        "XLA_FLAGS": warm.XLA_FLAGS,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        **more,
    }


def run_to_end(workdir, npz, *overrides, **variables):
    return warm.run(command(workdir, npz, *overrides), env=environment(**variables))


def start(workdir, npz):
    return warm.Popen(
        command(workdir, npz),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment(),
    )


def arrays_of(workdir):
    """The raw bytes that matter: checksums of every array in the last checkpoint."""
    manifest = json.loads((workdir / f"checkpoints/{STEPS}/manifest/metadata").read_text())
    return {name: entry["checksum"] for name, entry in manifest["arrays"].items()}


def rows_of(workdir):
    """Training rows, without what depends on the clock."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    timed = ("images_per_sec", "input_wait_fraction", "goodput", "run_seconds", "time/", "hosts/")
    return [
        {name: value for name, value in row.items() if not any(t in name for t in timed)}
        for row in rows
    ]


def assert_same_run(workdir, undisturbed):
    assert (workdir / "DONE").exists()
    assert arrays_of(workdir) == arrays_of(undisturbed)
    assert merged(rows_of(workdir)) == merged(rows_of(undisturbed))
    steps = [row["step"] for row in rows_of(workdir) if "train/loss" in row]
    assert steps == list(range(1, STEPS + 1))


def merged(rows):
    by_step = {}
    for row in rows:
        for name, value in row.items():
            assert name == "step" or name not in by_step.get(row["step"], {}), (name, row["step"])
            by_step.setdefault(row["step"], {})[name] = value
    return by_step


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, digits_npz):
    workdir = tmp_path_factory.mktemp("undisturbed")
    done = run_to_end(workdir, digits_npz)
    assert done.returncode == 0, done.stderr
    return workdir


def kill_at_random_moments(workdir, npz, kills, seed):
    """Kills the run `kills` times, each after it has said a random number of lines more."""
    rng = random.Random(seed)
    for _ in range(kills):
        process = start(workdir, npz)
        lines = rng.randint(2, 2 + 3 * STEPS // (kills + 1))
        for _ in range(lines):
            if not process.stderr.readline():
                break
        time.sleep(rng.uniform(0, 0.05))  # Anywhere inside a step or a save, not only after a line.
        process.kill()
        process.communicate()
        if process.returncode == 0:
            break


def send_and_read_the_end(number, process, workdir):
    """A signal ends the run with the code and the line for it."""
    process.send_signal(number)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 75, rest
    last = rest.strip().splitlines()[-1]
    assert f"{number.name}: saved step" in last
    assert f"of {STEPS} in {workdir}" in last
    assert "Traceback" not in rest


def damage_the_newest(workdir):
    """Changes one bit of the arrays; returns the checkpoint."""
    steps = [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    newest = workdir / f"checkpoints/{max(steps)}"
    largest = max((newest / "state").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 0x10
    largest.write_bytes(content)
    return newest


def test_a_run_that_is_killed_stopped_and_damaged_ends_as_if_nothing_had_happened(
    undisturbed, digits_npz, tmp_path
):
    process = start(tmp_path, digits_npz)
    warm.wait_for_step(process, 5)
    time.sleep(random.uniform(0, 0.05))  # Anywhere inside a step or a save.
    process.kill()
    process.communicate()

    process = start(tmp_path, digits_npz)
    warm.wait_for_step(process, 11)
    send_and_read_the_end(signal.SIGTERM, process, tmp_path)

    damaged = damage_the_newest(tmp_path)
    done = run_to_end(tmp_path, digits_npz)
    assert done.returncode == 0, done.stderr
    assert f"renamed {damaged.name}.damaged" in done.stderr
    assert damaged.with_name(f"{damaged.name}.damaged").is_dir()
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(5))
def test_twenty_kills(undisturbed, digits_npz, tmp_path, seed):
    kill_at_random_moments(tmp_path, digits_npz, kills=20, seed=seed)
    done = run_to_end(tmp_path, digits_npz)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.soak
def test_an_interrupt_saves_says_so_and_exits_75(undisturbed, digits_npz, tmp_path):
    process = start(tmp_path, digits_npz)
    warm.wait_for_step(process, 7)
    send_and_read_the_end(signal.SIGINT, process, tmp_path)
    done = run_to_end(tmp_path, digits_npz)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path, undisturbed)


def has_its_handlers(process):
    """Returns whether SIGTERM is caught, which takes Python a moment at its start."""
    caught = Path(f"/proc/{process.pid}/status").read_text().partition("SigCgt:")[2].split()[0]
    return int(caught, 16) >> (signal.SIGTERM - 1) & 1


def signal_at_a_random_moment(workdir, npz, number, rng):
    """Before the first step or after it; returns how the run ended."""
    process = start(workdir, npz)
    while process.poll() is None and not has_its_handlers(process):
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 8))
    process.send_signal(number)
    _, said = process.communicate(timeout=300)
    assert "Traceback" not in said, said
    assert process.returncode in ((75, 0) if number == signal.SIGTERM else (75, 130, 0)), said
    assert not (workdir / "LOCK").exists()
    return process.returncode


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_at_any_moment_leave_a_run_that_goes_on(undisturbed, digits_npz, tmp_path, number):
    rng, workdir = random.Random(0), tmp_path / "0"
    for moment in range(50):
        if signal_at_a_random_moment(workdir, digits_npz, number, rng) == 0:
            workdir = tmp_path / str(moment + 1)
    done = run_to_end(workdir, digits_npz)
    assert done.returncode == 0, done.stderr
    assert_same_run(workdir, undisturbed)


@pytest.mark.soak
def test_full_disk_during_a_save_leaves_the_previous_checkpoint(digits_npz, tmp_path):
    """A process may write no file larger than the limit, so a save fails half-way.

    One kernel of this model is more than four times the limit: no way of laying arrays out in
    files lets a save pass.
    """
    # One rate, whatever the total: both runs are the same program, which is compiled once.
    wide = ("--config.model.mlp_dim=4096", "--config.optim.schedule.name=constant")

    first = run_to_end(tmp_path, digits_npz, *wide, "--config.total=4")
    assert first.returncode == 0, first.stderr
    files = [path for path in (tmp_path / "checkpoints/4").rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    more = (*wide, "--config.total=8", "--config.checkpoint.retries=1")
    failed = run_to_end(tmp_path, digits_npz, *more, **{warm.LARGEST_FILE: "60000"})
    assert failed.returncode == 2, failed.stderr
    last = failed.stderr.strip().splitlines()[-1]
    assert last.startswith("error: cannot save a checkpoint")
    assert "the last good one is step 4" in last
    assert failed.stderr.count("trying again") == 1
    for path, content in before.items():
        assert path.read_bytes() == content


@pytest.mark.soak
def test_steps_of_a_damaged_last_checkpoint_are_saved_again(undisturbed, digits_npz, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    (workdir / "DONE").unlink()
    damage_the_newest(workdir)
    done = run_to_end(workdir, digits_npz)
    assert done.returncode == 0, done.stderr
    assert f"renamed {STEPS}.damaged" in done.stderr
    assert_same_run(workdir, undisturbed)
