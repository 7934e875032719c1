"""What a step sends on TPUs is what theory says, by ahead-of-time compiles."""

import importlib.util

import jax
import pytest

from vit_jax import config as config_lib
from vit_jax import data
from vit_jax.hlo import Program
from vit_jax.planning.target import Target
from vit_jax.run import Run

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra `tpu`)"
)


def test_sharded_parameters_send_two_gathers_and_one_sum():
    """fsdp over 4 chips, every block computed twice: gathered forward, again backward, summed.

    Kernels travel in bfloat16 but for the head's gradient, and mixup moves one row of images.
    """
    config = config_lib.default_config()
    config.batch_size = 64
    config.total = 10
    config.model = {
        "name": "vit", "patch_size": 32, "width": 256, "depth": 2, "num_heads": 2,
        "remat": "full", "dtype": "bfloat16",
    }  # fmt: skip
    config.task.mixup = 0.2
    config.data.source, config.data.args = "fake", {"encoded": True, "num_classes": 1000}
    config.data.pp = "decode_jpeg_and_inception_crop(224)"
    config.mesh.data, config.mesh.fsdp = 1, 4
    config = config_lib.validate(config)
    run = Run.build(config, Target.find("v5e:2x2").devices, data.expect(config.data))
    program = Program(run.compile_step().as_text())
    params = run.abstract.params
    share = 3 / 4
    blocks = sum(leaf.size for leaf in jax.tree.leaves(params["backbone"]["blocks"]))
    patches = params["backbone"]["patch_embed"]["kernel"].size
    head = params["head"]["kernel"].size
    least = share * (3 * 2 * blocks + 2 * 2 * patches + (2 + 4) * head) + 4 * 224 * 224 * 3
    sent = sum(collective.total_sent for collective in program.collectives())
    assert 0.9 * least < sent <= 1.1 * least
