"""The table of peaks: every name a device may have finds its chip, and shares add up."""

import pytest

from vit_jax.errors import UserError
from vit_jax.parallel import accelerators


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v2", "v2"),
        ("TPU v3", "v3"),
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU v6e", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
    ],
)
def test_every_kind_of_device_finds_its_chip(kind, name):
    assert accelerators.of_kind(kind) is accelerators.CHIPS[name]


@pytest.mark.parametrize("kind", ["cpu", "TPU v4 lite", "NVIDIA GeForce RTX 4090", ""])
def test_unknown_devices_have_no_peak(kind):
    assert accelerators.of_kind(kind) is None


def test_chips_of_two_devices_share():
    chip = accelerators.CHIPS["tpu7x"]
    assert chip.devices * chip.flops_per_device == chip.flops
    assert chip.devices * chip.hbm_bytes_per_device == chip.hbm_bytes


@pytest.mark.parametrize(
    "text",
    ["v5e:1x2", "v5e:3x5", "v5e:0x2", "v5e:4", "v6e:2x2x2", "v4:4x4", "v5p:2x2x0", "v4:1x2x2"],
)
def test_shapes_that_no_slice_has_are_told_in_one_line(text):
    with pytest.raises(UserError, match=f"'{text}' is no shape of a slice; write") as caught:
        accelerators.parse_slice(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "hosts"), [("v5e:1x1", 1), ("v5e:2x2", 1), ("v4:4x4x16", 64)])
def test_shapes_of_slices_have_their_hosts(text, hosts):
    assert accelerators.parse_slice(text).hosts == hosts
