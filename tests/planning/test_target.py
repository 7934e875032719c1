"""Names of topologies, and what is missing where one cannot be had."""

import importlib.util
import math

import jax
import pytest

from vit_jax.errors import UserError
from vit_jax.parallel import accelerators
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
        ("tpu7x-2", ("tpu7x", "1x1x1")),
    ],
)
def test_names_of_tpu_topologies(name, expected):
    assert parse_tpu(name) == expected


CUBES = """
    4x4x4 4x4x8 4x4x12 4x8x8 4x4x20 4x8x12 4x4x28 8x8x8 4x12x12 4x8x20 4x4x44 8x8x12 4x4x52 4x8x28
    4x12x20 8x8x16 4x4x68 8x12x12 4x4x76 8x8x20 4x12x28 4x8x44 4x4x92 8x12x16 4x20x20 4x8x52
    12x12x12 8x8x28 4x4x116 8x12x20 4x4x124 8x16x16 4x12x44 4x8x68 4x20x28 12x12x16 4x4x148 4x8x76
    4x12x52 8x16x20 4x4x164 8x12x28 4x4x172 8x8x44 12x12x20 4x8x92 4x4x188 12x16x16 4x28x28 8x20x20
    4x12x68 8x8x52 4x4x212 12x12x24 4x20x44 8x16x28 4x12x76 4x8x116 4x4x236 12x16x20 4x4x244
    4x8x124 12x12x28 16x16x16 4x20x52 8x12x44 8x8x68 4x12x92 8x20x28 12x16x24 4x8x148 12x20x20
    8x8x76 4x28x44 8x12x52 16x16x20 12x12x36 4x8x164 12x16x28 4x20x68 4x8x172 4x12x116 8x16x44
    12x20x24 4x28x52 8x8x92 4x12x124 4x8x188 4x20x76 16x16x24
"""
PUBLISHED = {  # The cores or chips that a type counts for each chip, then the shapes of all types.
    "v2": (2, "2x2 4x4 8x8 8x16 16x16"),
    "v3": (2, "2x2 4x4 4x8 8x8 8x16 16x16 16x32 32x32"),
    "v4": (2, "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x12 8x8x16 8x16x16 16x16x16"),
    "v5litepod": (1, "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"),
    "v5p": (2, f"2x2x1 2x2x2 2x2x4 2x4x4 {CUBES}"),
    "v6e": (1, "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"),
    "tpu7x": (2, f"1x1x1 2x2x1 2x2x2 2x2x4 2x4x4 {CUBES} 12x24x24 16x16x32 16x20x28 16x24x24"),
}
"""Sources: docs.cloud.google.com/tpu/docs/v2 to /v6e and /tpu7x; v5p and tpu7x: the tables of xpk
(core/system_characteristics.py) and AXLearn (USER_FACING_NAME_TO_SYSTEM_CHARACTERISTICS)."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_type_has_its_shape(name):
    each, shapes = PUBLISHED[name]
    types = {f"{name}-{each * math.prod(map(int, s.split('x')))}": s for s in shapes.split()}
    assert len(types) == len(shapes.split())
    slices = {type_: accelerators.parse_slice(type_) for type_ in types}
    assert {type_: found.shape for type_, found in slices.items()} == types
    assert all(found.type == type_ for type_, found in slices.items())
    assert len(next(iter(slices.values())).tpu.shapes) == len(types)


@pytest.mark.parametrize(
    ("type_", "hosts", "machine"),
    [
        ("v3-8", 1, ""),
        ("v4-32", 4, "ct4p-hightpu-4t"),
        ("v5litepod-4", 1, "ct5lp-hightpu-4t"),
        ("v5litepod-8", 1, "ct5lp-hightpu-8t"),
        ("v5litepod-16", 4, "ct5lp-hightpu-4t"),
        ("v5p-12288", 1536, "ct5p-hightpu-4t"),
        ("v6e-1", 1, "ct6e-standard-1t"),
        ("v6e-256", 64, "ct6e-standard-4t"),
        ("tpu7x-2", 1, "tpu7x-standard-1t"),
        ("tpu7x-8", 1, "tpu7x-standard-4t"),
        ("tpu7x-128", 16, "tpu7x-standard-4t"),
    ],
)
def test_hosts_and_machines_of_a_slice(type_, hosts, machine):
    found = accelerators.parse_slice(type_)
    assert (found.hosts, found.tpu.machine(found.chips)) == (hosts, machine)


@pytest.mark.parametrize(
    ("topology", "slices", "message"),
    [
        ("v5f:4x4", 1, "no TPU 'v5f'; did you mean 'v5"),
        ("pod", 1, "not understood; write such as v5e:16x16"),
        ("v5e-7", 1, "no usual shape; slices of v5e have 1, 4, 8, 16, 32, 64, 128, 256 chips"),
        ("v5p-6", 1, "'v5p-6' has no usual shape; slices of v5p have 4, 8, 16, 32, 64, 128, 256, "),
        ("v5e:3x3", 1, "plan: --topology='v5e:3x3' is no shape of a slice; write 2 sides"),
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
    with pytest.raises(UserError, match=r"needs the TPU compiler.*extra 'tpu' .*'jax\[tpu\]'"):
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
@pytest.mark.parametrize(
    ("name", "devices"), [("v5e-1", 1), ("v6e-1", 1), ("tpu7x-2", 2), ("v5e-8", 8), ("v4-8", 4)]
)
def test_a_slice_of_one_host_has_one(name, devices):
    found = Target.find(name)
    assert (len(found.devices), found.num_hosts) == (devices, 1)


@needs_libtpu
def test_shape_that_the_compiler_refuses():
    with pytest.raises(UserError, match=r"plan: --topology=v5e:3x3: .*not divisible"):
        target._tpu_devices("v5e", "3x3", 1)


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
