"""mIoU and COCO's AP do not depend on who evaluates: processes, devices, batch sizes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scenes_together.py"


@pytest.fixture(scope="module")
def alone():
    """Metrics of one process on eight devices, whose last batch is part padding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        import scenes_together

        found = {size: scenes_together.metrics(size) for size in (8, 24)}
    assert found[8] == found[24]
    return found[8]


def test_what_is_compared_means_something(alone):
    assert alone["segmentation/scenes/num_examples"] == alone["detection/scenes/num_examples"] == 21
    assert 0 < alone["segmentation/scenes/miou"] < 1
    assert 0 < alone["detection/scenes/AP"] < 1


@pytest.mark.soak  # The default suite has two processes that evaluate as one.
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_find_together_what_one_finds(alone, processes):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, str(SCRIPT), "8", address, str(processes)]
    started = [
        subprocess.Popen(
            [*command, str(index)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for index in range(processes)
    ]
    outputs = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0] * processes, outputs
    assert json.loads(outputs[0][0].splitlines()[-1]) == alone
