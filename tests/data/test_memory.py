"""The host's memory over many epochs of decoding."""

import json
import subprocess
import sys

import pytest

HUNDRED_EPOCHS = """
import json
from pathlib import Path

from vit_jax.parallel import processes
from vit_jax.config import default_config
from vit_jax.training.run import host_batches, open_source

def resident_mib():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20

processes.setup("", "default")
config = default_config()
config.batch_size = 64
config.data.source, config.data.name, config.data.split = "fake", "fake", "train"
config.data.args = {"encoded": True, "num_examples": 128}
config.data.pp = "decode_jpeg_and_inception_crop(64)|flip_lr|randaug(2,10)"
at = []
with host_batches(config, open_source(config.data), start_step=0) as batches:
    for _ in range(200):
        next(batches)
        at.append(resident_mib())
print(json.dumps(at))
"""


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_flat_over_a_hundred_epochs(request):
    done = subprocess.run(
        [sys.executable, "-c", HUNDRED_EPOCHS],
        check=False,
        capture_output=True,
        text=True,
        cwd=request.config.rootpath,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    at = json.loads(done.stdout)
    assert len(at) == 200
    assert max(at[100:]) - max(at[20:100]) < 50  # MiB, of about a thousand
    assert max(at) < 4096
