"""A step sends on TPUs what theory says, by ahead-of-time compiles."""

import importlib.util

import jax
import pytest

from vit_jax import config as config_lib
from vit_jax import data
from vit_jax.planning.hlo import Program
from vit_jax.planning.target import Target
from vit_jax.training.run import Run

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra `tpu`)"
)


TOKENS = 7 * 7 + 1


def compiled(depth, num_heads=2, topology="v5e:2x2", width=256, **mesh):
    """A small ViT, 16 images a chip, every block computed twice.

    Returns the run, MB that a chip sends, and the kinds of what it sends beside computation.
    """
    config = config_lib.default_config()
    devices = Target.find(topology).devices
    config.batch_size = 16 * len(devices)
    config.total = 10
    config.model = {
        "name": "vit", "patch_size": 32, "width": width, "depth": depth, "num_heads": num_heads,
        "remat": "full", "dtype": "bfloat16",
    }  # fmt: skip
    config.task.mixup = 0.2
    config.data.source, config.data.args = "fake", {"encoded": True, "num_classes": 1000}
    config.data.pp = "decode_jpeg_and_inception_crop(224)"
    for key, value in mesh.items():
        config.mesh[key] = value
    config = config_lib.validate(config)
    run = Run.build(config, devices, data.expect(config.data))
    program = Program(run.compile_step().as_text())
    sent = program.collectives()
    beside = {collective.kind for collective in sent if collective.is_overlapped}
    return run, sum(collective.total_sent for collective in sent) / 1e6, beside


def millions(run):
    """Parameters of the blocks, the patch embedding's kernel and the head's, in millions."""
    params = run.abstract.params
    blocks = sum(leaf.size for leaf in jax.tree.leaves(params["backbone"]["blocks"]))
    patches = params["backbone"]["patch_embed"]["kernel"].size
    return blocks / 1e6, patches / 1e6, params["head"]["kernel"].size / 1e6


# Kernels and their gradients travel in bfloat16, but for the head's gradient; mixup moves one row
# of images from chip to chip wherever the batch is split.
MIXUP = 4 * 224 * 224 * 3 / 1e6


def test_data_parallel_sends_one_sum_of_gradients():
    run, sent, _ = compiled(2, data=4)
    blocks, patches, head = millions(run)
    least = 2 * 3 / 4 * (2 * blocks + 2 * patches + 4 * head) + MIXUP
    assert 0.95 * least < sent <= 1.1 * least, sent / least


def test_zero1_scatters_the_sum_and_gathers_parameters():
    """The parameters in float32, as they are kept."""
    run, sent, _ = compiled(2, data=4, zero1=True)
    blocks, patches, head = millions(run)
    least = 3 / 4 * ((2 + 4) * (blocks + patches) + (4 + 4) * head) + MIXUP
    assert 0.95 * least < sent <= 1.1 * least, sent / least


def test_sharded_parameters_send_two_gathers_and_one_sum():
    """Gathered forward and again backward, both while the chip computes, and summed."""
    run, sent, beside = compiled(2, data=1, fsdp=4)
    blocks, patches, head = millions(run)
    least = 3 / 4 * (3 * 2 * blocks + 2 * 2 * patches + (2 + 4) * head) + MIXUP
    assert "all-gather" in beside
    assert 0.95 * least < sent <= 1.1 * least, sent / least


@pytest.mark.parametrize(
    ("num_heads", "width"),
    [(6, 384), (12, 768)],  # Split along the width of a head, and along heads.
)
def test_sums_of_attention_kernels_are_scattered(num_heads, width):
    """XLA lays them out with `embed` along the lanes, where a TPU cannot scatter."""
    run, sent, _ = compiled(2, num_heads, width=width, data=1, fsdp=4)
    blocks, patches, head = millions(run)
    least = 3 / 4 * (3 * 2 * blocks + 2 * 2 * patches + (2 + 4) * head) + MIXUP
    assert 0.95 * least < sent <= 1.1 * least, sent / least


@pytest.mark.parametrize(
    ("topology", "data", "fsdp"), [("v5e:4x4", 4, 4), ("v6e:4x4", 4, 4), ("v5p:2x2x2", 2, 4)]
)
def test_sums_are_scattered_over_a_part_of_a_slice(topology, data, fsdp):
    """Each device then sums its part over `data`. Over the whole slice XLA scatters nothing."""
    run, sent, _ = compiled(2, 4, topology=topology, data=data, fsdp=fsdp)
    blocks, patches, head = millions(run)
    sharded = (fsdp - 1) / fsdp * (3 * 2 * blocks + 2 * 2 * patches + (2 + 4) * head)
    parts = 2 * (data - 1) / data / fsdp * (2 * blocks + 2 * patches + 4 * head)
    least = sharded + parts + MIXUP
    assert 0.95 * least < sent <= 1.1 * least, sent / least


def sums_over_tensor(depth, batch, ways):
    """A block sums its outputs twice forward, twice backward, and once as it is computed again."""
    return depth * 5 * 2 * (ways - 1) / ways * batch * TOKENS * 256 * 2 / 1e6


def test_tensor_parallel_sends_five_sums_a_block():
    _, sent, _ = compiled(2, num_heads=4, data=1, tensor=4)
    assert sent == pytest.approx(sums_over_tensor(2, 64, 4), rel=0.01)


def test_sharded_and_tensor_parallel_sends_both():
    run, sent, _ = compiled(12, num_heads=4, data=1, fsdp=2, tensor=2)
    blocks, patches, head = millions(run)
    parameters = 1 / 2 * (3 * 2 * blocks / 2 + 2 * 2 * patches + (2 + 4) * head)
    least = sums_over_tensor(12, 32, 2) + parameters + MIXUP
    assert 0.95 * least < sent <= 1.1 * least, sent / least
