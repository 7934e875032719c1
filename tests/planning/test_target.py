"""Names of topologies, and what is missing where one cannot be had."""

import importlib.util

import jax
import pytest

from vit_jax.errors import UserError
from vit_jax.parallel.sharding import make_mesh
from vit_jax.planning import target
from vit_jax.planning.target import Target, parse_tpu

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra `tpu`)"
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v5e:4x4", ("v5e", "4x4")),
        ("v5litepod-256", ("v5e", "16x16")),
        ("v5e-8", ("v5e", "2x4")),
        ("v5p-512", ("v5p", "4x8x8")),  # 512 cores are 256 chips.
        ("v3-32", ("v3", "4x4")),
        ("v4-8", ("v4", "2x2x1")),
        ("v6e-256", ("v6e", "16x16")),
        ("tpu7x:4x4x4", ("tpu7x", "4x4x4")),
        ("tpu7x-128", ("tpu7x", "4x4x4")),  # TensorCores, two in a chip.
        ("tpu7x-8", ("tpu7x", "2x2x1")),
    ],
)
def test_names_of_tpu_topologies(name, expected):
    assert parse_tpu(name) == expected


@pytest.mark.parametrize(
    ("topology", "slices", "message"),
    [
        ("v5f:4x4", 1, "no TPU 'v5f'; did you mean 'v5"),
        ("pod", 1, "not understood; write such as v5e:16x16"),
        ("v5e-7", 1, "no usual shape; slices of v5e have 1, 4, 8, 16, 32, 64, 128, 256 chips"),
        ("cpu:0", 1, "write such as cpu:8"),
        ("cpu:9", 1, "has 8 virtual CPU devices"),
        ("cpu:8", 2, "--slices=2 needs a TPU --topology"),
        ("v5e:4x4", 0, "--slices=0: write a number from 1 up"),
        ("gpu", 1, "JAX sees no GPU here"),
    ],
)
def test_wrong_targets_are_told_in_one_line(topology, slices, message):
    with pytest.raises(UserError, match=message) as caught:
        Target.find(topology, slices)
    assert "\n" not in str(caught.value)


def test_without_libtpu_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(target.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the TPU compiler.*pip install -e '\.\[tpu\]'"):
        Target.find("v5e:4x4")


def test_virtual_cpus_and_what_is_here():
    assert len(Target.find("cpu:4").devices) == 4
    here = Target.find()
    assert (len(here.devices), here.num_chips, here.chip) == (len(jax.devices()), 8, None)


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "slices", "devices", "num_chips"),
    [("v5e:4x4", 1, 16, 16), ("v5p-512", 1, 256, 256), ("v4-8", 1, 4, 4), ("v3-8", 1, 8, 4),
     ("v6e:2x2", 4, 16, 16), ("tpu7x:2x2x1", 1, 8, 4)],
)  # fmt: skip
def test_tpu_topologies(name, slices, devices, num_chips):
    found = Target.find(name, slices)
    assert (len(found.devices), found.num_chips) == (devices, num_chips)
    assert len({getattr(d, "slice_index", None) for d in found.devices}) == slices


@needs_libtpu
def test_shape_that_no_tpu_has():
    with pytest.raises(UserError, match=r"plan: --topology=v5e:3x3: .*not divisible"):
        Target.find("v5e:3x3")


@needs_libtpu
@pytest.mark.parametrize("slices", [1, 4])
def test_meshes_that_cut_through_the_torus(slices):
    """128 is no side of a 16×16 slice, nor a product of its sides; data spans the slices."""
    devices = Target.find("v5e-256", slices).devices
    mesh = make_mesh({"data": -1, "fsdp": 128, "tensor": 1}, devices)
    assert dict(mesh.shape) == {"data": 2 * slices, "fsdp": 128, "tensor": 1}
    for row in mesh.devices.reshape(slices, -1):
        assert len({getattr(device, "slice_index", None) for device in row}) == 1


@needs_libtpu
@pytest.mark.parametrize(("name", "fsdp"), [("v6e:4x4", 8), ("v5p:4x4x4", 8), ("v3:4x4", 8)])
def test_meshes_that_cut_a_side_of_the_torus(name, fsdp):
    devices = Target.find(name).devices
    mesh = make_mesh({"data": -1, "fsdp": fsdp, "tensor": 1}, devices)
    assert dict(mesh.shape) == {"data": len(devices) // fsdp, "fsdp": fsdp, "tensor": 1}
    assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in devices)


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "slices", "sides"), [("v5e:8x16", 2, [8, 16]), ("v5p:4x4x8", 1, [4, 4, 8])]
)
def test_sides_of_a_slice(name, slices, sides):
    assert sorted(side for side in Target.find(name, slices).sides if side > 1) == sides


def test_other_devices_have_no_sides():
    assert Target.find("cpu:8").sides == ()
