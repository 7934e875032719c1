"""The batch script: what it starts, and when it queues itself again."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "scripts/slurm.sh"


@pytest.mark.parametrize(
    ("code", "requeued"), [(0, False), (1, False), (2, False), (75, True), (134, True)]
)
def test_a_run_that_was_cut_short_is_queued_again(tmp_path, code, requeued):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("srun", f'echo "$@" >> {tmp_path}/srun; exit {code}'),
                       ("scontrol", f'echo "$@" >> {tmp_path}/scontrol')):  # fmt: skip
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    done = subprocess.run(
        [SCRIPT, "--config=c.py", "--workdir=/shared/run"],
        env={**os.environ, "PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_ID": "7",
             "SLURM_SUBMIT_DIR": str(tmp_path)},
        check=False,
    )  # fmt: skip
    asked = (tmp_path / "scontrol").read_text() if requeued else ""
    assert asked == ("requeue 7\n" if requeued else "")
    assert (tmp_path / "scontrol").exists() == requeued
    assert done.returncode == (0 if requeued else code)
    assert "train --config=c.py --workdir=/shared/run" in (tmp_path / "srun").read_text()
