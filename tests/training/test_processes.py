"""Several processes on loopback: the same batches, losses and evaluation as one process."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import warm

from vit_jax import config as config_lib
from vit_jax.training import loop

TINY = Path(__file__).parents[1] / "tiny.py"
STEPS = 8
KILLS = 10
STEPS_OF_MANY_KILLS = 80  # The next attempt goes on where one was killed: enough for all of them.


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(workdir, npz, processes, *overrides, steps=STEPS, scheduler=False, stderr=None):
    """Starts the command in `processes` processes of one device each.

    steps: of the whole run.
    scheduler: let variables tell them of each other, as SLURM sets them, instead of flags.
    stderr: files, one a process; default: pipes.
    """
    command = [
        "train", f"--workdir={workdir}", "--config.accum_steps=2", *overrides,
    ]  # fmt: skip
    environment = {**os.environ, "XLA_FLAGS": warm.XLA_FLAGS, "PYTHONPATH": str(TINY.parent.parent)}
    port = free_port()
    started = []
    for index in range(processes):
        own, variables = [f"--config={TINY}:npz={npz},steps={steps}"], {}
        if callable(npz):
            own = [f"--config={TINY}:npz={npz(index)},steps={steps}"]
        if processes > 1 and scheduler:
            variables = {
                "SLURM_JOB_ID": "1",
                "SLURM_STEP_NODELIST": "127.0.0.1",
                "SLURM_NTASKS": str(processes),
                "SLURM_PROCID": str(index),
                "SLURM_LOCALID": str(index),
                "JAX_COORDINATOR_PORT": str(port),
            }
        elif processes > 1:
            own += [
                f"--coordinator=127.0.0.1:{port}",
                f"--num-processes={processes}",
                f"--process-id={index}",
            ]
        started.append(
            warm.Popen(
                [*command, *own],
                stdout=subprocess.PIPE,
                stderr=stderr[index] if stderr else subprocess.PIPE,
                env={**environment, **variables},
            )
        )
    return started


def train(*args, **kwargs):
    """Runs the command to its end; returns what each process said."""
    started = start(*args, **kwargs)
    outputs = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0] * len(started), outputs
    return outputs


def rows(workdir, name):
    found = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if name in row:
            assert row["step"] not in found
            found[row["step"]] = row[name]
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory, digits_npz, running_on_one_device):
    """The same run in this process, which has all imported, on one device."""
    workdir = tmp_path_factory.mktemp("alone")
    config = config_lib.load(f"{TINY}:npz={digits_npz},steps={STEPS}")
    config.unlock()
    config.accum_steps = 2
    with running_on_one_device():
        loop.train(config_lib.validate(config), str(workdir))
    return workdir


def test_two_processes_train_and_evaluate_as_one(alone, digits_npz, tmp_path):
    outputs = train(tmp_path, digits_npz, 2, scheduler=True)
    assert "report:" in outputs[0][0]
    assert "step" not in "".join(outputs[1])  # Only the first process speaks.
    together, single = rows(tmp_path, "train/loss"), rows(alone, "train/loss")
    assert list(together) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(together.values()), list(single.values()), rtol=2e-5)
    assert rows(tmp_path, "eval/val/num_examples") == rows(alone, "eval/val/num_examples")
    assert rows(tmp_path, "eval/val/accuracy") == rows(alone, "eval/val/accuracy")
    assert set(rows(tmp_path, "hosts/last_to_arrive").values()) <= {0, 1}


@pytest.mark.soak
def test_what_two_processes_began_before_one_was_killed_one_ends(alone, digits_npz, tmp_path):
    both = start(tmp_path, digits_npz, 2, "--config.checkpoint.every=1")
    warm.wait_for_step(both[0], 5)
    both[1].kill()
    _, said = both[0].communicate(timeout=60)
    # 75 where Python learns of the loss first, SIGABRT where JAX does.
    assert both[0].returncode in (75, -signal.SIGABRT), said
    assert "Traceback" not in said
    both[1].communicate()
    train(tmp_path, digits_npz, 1)
    assert_same_losses(tmp_path, alone)


@pytest.mark.soak
@pytest.mark.parametrize(("told", "number"), [(1, signal.SIGTERM), (0, signal.SIGINT)])
def test_a_signal_to_one_process_saves_the_same_step_in_both(told, number, digits_npz, tmp_path):
    both = start(tmp_path, digits_npz, 2, "--config.total=100000")
    warm.wait_for_step(both[0], 5)
    both[told].send_signal(number)
    said = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [75, 75], said
    last = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert f"saved step {last} of 100000" in said[0]


def assert_same_losses(workdir, alone):
    pieces, whole = rows(workdir, "train/loss"), rows(alone, "train/loss")
    assert list(pieces) == list(whole)
    np.testing.assert_allclose(list(pieces.values()), list(whole.values()), rtol=2e-5)


class Watched:
    """Processes with parents that start them again; what they say goes to files."""

    def __init__(self, folder, workdir, npz, *, steps=STEPS, processes=2, overrides=()):
        self.workdir = workdir
        self.logs = [folder / f"{index}.log" for index in range(processes)]
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(log.open("w")) for log in self.logs]
            flags = ("--config.checkpoint.every=1", "--restarts=30", *overrides)
            self.parents = start(workdir, npz, processes, *flags, steps=steps, stderr=files)

    def child(self, index):
        """The process that parent `index` watches over; 0 while there is none."""
        pid = self.parents[index].pid
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except FileNotFoundError:  # The parent has ended too.
            return 0
        return int(children[0]) if children else 0

    def kill(self, index):
        """Returns how many processes that were: one, or none where none ran."""
        child = self.child(index)
        if not child:  # Process 0 would be all of this group, this one among them.
            return 0
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        return 1

    def wait_for(self, moment):
        """Returns once `moment()` is true, or the run is over."""
        while not moment() and self.parents[0].poll() is None:
            time.sleep(0.002)

    def says(self, words):
        """A moment: process 0 says `words` from now on."""
        known = len(self.logs[0].read_text())
        return lambda: words in self.logs[0].read_text()[known:]

    def saves(self):
        return any("tmp" in path.name for path in (self.workdir / "checkpoints").iterdir())

    def reads_a_checkpoint(self, index):
        """A moment: a file of a checkpoint is open in a process that was started after now."""
        old, resumed = self.child(index), self.says("resuming after")

        def moment():
            pid = self.child(index)
            if pid in (0, old):
                return False
            with contextlib.suppress(OSError):
                for link in Path(f"/proc/{pid}/fd").iterdir():
                    with contextlib.suppress(OSError):
                        if "/checkpoints/" in os.readlink(link):
                            return True
            return resumed()

        return moment

    def end(self):
        for parent in self.parents:
            parent.wait(timeout=500)
        said = [log.read_text() for log in self.logs]
        assert [parent.returncode for parent in self.parents] == [0] * len(said), said
        return said


def shortened(alone, tmp_path):
    """A copy of a finished run without its end: it is at step 6 of 8."""
    workdir = tmp_path / "run"
    shutil.copytree(alone, workdir)
    (workdir / "DONE").unlink()
    shutil.rmtree(workdir / f"checkpoints/{STEPS}")
    return workdir


@pytest.mark.soak
def test_kills_during_a_save_a_restore_and_an_evaluation(alone, digits_npz, tmp_path):
    """Two processes go on where one was; each kill makes the parents start both again."""
    run = Watched(tmp_path, shortened(alone, tmp_path), digits_npz)
    run.wait_for(run.saves)
    reads = run.reads_a_checkpoint(1)
    run.kill(0)
    run.wait_for(reads)
    evaluates = run.says("evaluating")
    run.kill(1)
    run.wait_for(evaluates)
    run.kill(0)
    said = run.end()
    assert "ended by SIGKILL" in said[0]
    assert "another process of this run" in said[1]
    assert_same_losses(run.workdir, alone)


@pytest.mark.soak
@pytest.mark.parametrize("killed", [0, 2])
def test_three_processes_end_what_kills_of_one_interrupt(digits_npz, tmp_path, killed):
    """In the first steps, in a save, in a restore and in an evaluation."""
    sizes = ("--config.batch_size=12", "--config.eval.batch_size=12")
    train(tmp_path / "alone", digits_npz, 1, *sizes)
    run = Watched(tmp_path, tmp_path / "run", digits_npz, processes=3, overrides=sizes)
    kills = 0
    for moment in (
        run.says("step 2/"),
        run.saves,
        run.reads_a_checkpoint((killed + 1) % 3),
        run.says("evaluating"),
    ):
        run.wait_for(moment)
        kills += run.kill(killed)
    run.end()
    assert kills >= 3
    assert_same_losses(run.workdir, tmp_path / "alone")


@pytest.fixture(scope="module")
def long_alone(tmp_path_factory, digits_npz):
    workdir = tmp_path_factory.mktemp("long_alone")
    train(workdir, digits_npz, 1, steps=STEPS_OF_MANY_KILLS)
    return workdir


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_ten_kills_of_either_process_at_any_moment(long_alone, digits_npz, tmp_path, seed):
    rng = random.Random(seed)
    # What every attempt but the first says, whatever step it starts from.
    moments = ("2 cpu device(s)", "resuming after", "step ", "evaluating")
    run = Watched(tmp_path, tmp_path / "run", digits_npz, steps=STEPS_OF_MANY_KILLS)
    moment, kills = run.says("step 2/"), 0
    while kills < KILLS and run.parents[0].poll() is None:
        run.wait_for(moment)
        time.sleep(rng.uniform(0, 0.2))
        moment = run.says(rng.choice(moments))
        kills += run.kill(rng.randrange(2))
    run.end()
    assert kills == KILLS
    assert_same_losses(run.workdir, long_alone)


@pytest.mark.soak
def test_a_process_that_fails_by_itself_takes_the_others_along(digits_npz, tmp_path):
    """Its own file is missing: it says so, and the other does not wait for it for ever."""
    both = start(tmp_path, lambda index: digits_npz if index == 0 else "gone.npz", 2)
    outputs = [process.communicate(timeout=120) for process in both]
    assert both[1].returncode == 2
    assert "gone.npz" in outputs[1][1]
    assert both[0].returncode in (75, -signal.SIGABRT), outputs[0]
