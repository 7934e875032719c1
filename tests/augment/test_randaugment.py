"""RandAugment on the device: the recorded operations bit for bit, the draws, the config."""

import json
import math
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampled

from vit_jax import config as config_lib
from vit_jax import tasks
from vit_jax.augment import gathers as _gathers
from vit_jax.augment import randaugment as _randaugment
from vit_jax.augment import strengths
from vit_jax.errors import UserError
from vit_jax.parallel import sharding
from vit_jax.planning.hlo import Program
from vit_jax.types import ArraySpec, DataInfo

GOLDEN = Path(__file__).parents[1] / "golden/big_vision"
CASES = json.loads((GOLDEN / "randaug_ops.json").read_text())["cases"]
ARRAYS = sampled.load(GOLDEN / "randaug_ops.npz")
IMAGES = np.random.default_rng(0).integers(0, 256, (32, 20, 24, 3), np.uint8)
EVERY = np.arange(32) % 16, np.arange(32) // 16
"""All operations, both ways."""


def apply(images, operations, negative, magnitude, places=None):
    places = np.zeros((len(images), 2), np.float32) if places is None else places
    apply = jax.jit(partial(_randaugment.apply, magnitude=magnitude))
    return np.asarray(apply(images, operations, negative, places))


@pytest.mark.parametrize(
    ("magnitude", "name"),
    [(10.0, "img"), (5.0, "img"), (10.0, "img_flatch"), (5.0, "img_flatch"), (10.0, "img_big")],
)
def test_operations_bit_for_bit(magnitude, name):
    cases = [c for c in CASES if (c["magnitude"], c["input_array"]) == (magnitude, name)]
    assert len(cases) >= 8
    images = np.stack([ARRAYS[name]] * len(cases))
    numbers = [_randaugment.OPERATIONS.index(case["op"]) for case in cases]
    negative = [int(bool(case["args"]) and case["args"][0] < 0) for case in cases]
    ours = apply(images, np.array(numbers), np.array(negative), magnitude)
    for case, image in zip(cases, ours, strict=True):
        sampled.assert_close(image, ARRAYS[case["key"]], err_msg=case["key"])


def test_recorded_cases_cover_all_operations_but_cutout():
    assert {case["op"] for case in CASES} == {*_randaugment.OPERATIONS} - {"Cutout"}


def test_cutout_greys_a_square_that_may_reach_over_the_border():
    places = np.float32([[40.9, 50.2], [3, 97]])
    cutout = np.full(2, _randaugment.OPERATIONS.index("Cutout"))
    images = np.zeros((2, 90, 100, 3), np.uint8)
    inside, over = apply(images, cutout, cutout * 0, 5.0, places)
    expected = np.zeros((2, 90, 100, 3), np.uint8)
    expected[0, 20:60, 30:70] = expected[1, :23, 77:] = 128
    np.testing.assert_array_equal(inside, expected[0])
    np.testing.assert_array_equal(over, expected[1])


@pytest.mark.parametrize("magnitude", [10, 20, 26])
def test_products_read_what_gathers_read(magnitude):
    """TPUs compute products instead of gathers; the angles have two, three and five phases."""
    matrices = strengths.matrices(magnitude / 10, IMAGES.shape[1:3], False)
    phases = _gathers.num_phases(matrices)
    assert phases == {10: 2, 20: 3, 26: 5}[magnitude]
    y, x = (grid[None].astype(np.float32) for grid in np.mgrid[:20, :24])

    @jax.jit
    def both(images, moves):
        columns, rows = _gathers._sources(moves, x, y)
        inside = (rows >= 0) & (rows < 20) & (columns >= 0) & (columns < 24)
        products = _gathers._read_by_products(images, rows, moves, phases)
        return inside, _gathers._read(images, columns, rows), products

    inside, gathered, products = map(np.asarray, both(IMAGES, matrices[EVERY]))
    np.testing.assert_array_equal(products[inside], gathered[inside])
    assert inside.mean() > 0.3


def gathered(program):
    """The shapes of what a lowered program gathers."""
    found = re.findall(r"stablehlo.gather.*-> tensor<([\dx]+)x", program)
    return [tuple(map(int, shape.split("x"))) for shape in found]


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_quarter_turn_is_a_quarter_turn(platform):
    """At magnitude 30, where products would divide by the cosine of 90 degrees."""
    images = IMAGES[:2, :, :20]
    rotate = np.full(2, _randaugment.OPERATIONS.index("Rotate"))
    turned = partial(_randaugment.apply, magnitude=30.0)
    args = images, rotate, np.array([0, 1]), np.zeros((2, 2), np.float32)
    if platform == "tpu":
        program = jax.jit(turned).trace(*args).lower(lowering_platforms=("tpu",)).as_text()
        assert any(math.prod(shape) == images.size for shape in gathered(program))
        return
    found = np.asarray(jax.jit(turned)(*args))
    np.testing.assert_array_equal(found[0], np.rot90(images[0]))
    np.testing.assert_array_equal(found[1], np.rot90(images[1], -1))


def test_products_count_and_look_up_what_scatters_and_gathers_do():
    counts = jax.jit(_gathers._count)(IMAGES)
    np.testing.assert_array_equal(
        counts[3, :, 1], np.bincount(IMAGES[3, ..., 1].ravel(), None, 256)
    )
    np.testing.assert_array_equal(jax.jit(_gathers._count_by_products)(IMAGES), counts)
    tables = np.random.default_rng(1).integers(0, 256, (32, 256, 3), np.uint8)
    found = jax.jit(_gathers._look_up)(tables, IMAGES)
    np.testing.assert_array_equal(found[5, ..., 2], tables[5, :, 2][IMAGES[5, ..., 2]])
    np.testing.assert_array_equal(jax.jit(_gathers._look_up_by_products)(tables, IMAGES), found)


@pytest.mark.parametrize(("platform", "gathers_pixels"), [("tpu", False), ("cpu", True)])
def test_tpus_gather_and_scatter_no_pixels(platform, gathers_pixels):
    traced = jax.jit(_randaugment.augment).trace(jax.random.key(0), IMAGES)
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    sizes = [math.prod(shape) for shape in gathered(program)]
    assert (max(sizes) > 32 * 256 * 3) == gathers_pixels
    assert ("stablehlo.scatter" in program) == gathers_pixels


def test_operations_ways_and_places_are_drawn_evenly_and_independently():
    draws = _randaugment.draw(jax.random.key(1), 2, (25_600, 90, 100, 3))
    operations, negative, places = jax.device_get(draws)
    pairs = np.bincount(16 * operations[0] + operations[1], None, 256)  # Each about 100 times.
    assert abs(pairs - 100).max() < 45
    assert 200 < ((pairs - 100) ** 2 / 100).sum() < 320  # Chi squared of 255 degrees.
    ways = np.bincount(2 * np.ravel(operations) + np.ravel(negative), None, 32)
    assert abs(ways - 1600).max() < 180
    np.testing.assert_allclose(np.mean(places, (0, 1)), [45, 50], rtol=0.01)
    assert (np.min(places, (0, 1)) < 0.1).all()
    assert (np.max(places, (0, 1)) > [89.9, 99.9]).all()
    assert abs(np.corrcoef(np.reshape(places, (-1, 2)).T)[0, 1]) < 0.02


def test_draws_do_not_depend_on_the_mesh_and_send_nothing():
    mesh = sharding.make_mesh({"data": 4, "fsdp": 2, "tensor": 1})
    places = sharding.batch_sharding(mesh)
    key = jax.random.key(0)
    apart = jax.jit(_randaugment.augment, in_shardings=(None, places), out_shardings=places)
    program = apart.lower(key, IMAGES).compile()
    assert list(Program(program.as_text()).collectives()) == []
    together = np.asarray(jax.jit(_randaugment.augment)(key, IMAGES))
    np.testing.assert_array_equal(program(key, jax.device_put(IMAGES, places)), together)
    layer = jax.jit(partial(_randaugment.apply, magnitude=10.0))
    first, second = zip(*_randaugment.draw(key, 2, IMAGES.shape), strict=True)
    np.testing.assert_array_equal(together, layer(layer(IMAGES, *first), *second))


def build(image=(8, 8, 3), dtype=np.uint8, **randaug):
    spec = {
        "image": ArraySpec(image, np.dtype(dtype)),
        "label": ArraySpec((), np.dtype(np.int32)),
    }
    tiny = {"name": "vit", "width": 8, "depth": 1, "num_heads": 1, "patch_size": 4}
    fields = (
        {"name": "classification", "randaug": randaug} if randaug else {"name": "classification"}
    )
    return tasks.build(fields, tiny, DataInfo(spec, 5))


def test_augments_in_training_only_and_before_normalising():
    batch = {"image": jnp.asarray(IMAGES[:, :8, :8]), "label": jnp.zeros(32, jnp.int32)}
    plain, augmented = build(), build(num_layers=1, magnitude=8)
    seen = jax.jit(augmented.augment)(batch, jax.random.key(1))["image"]
    again = jax.jit(augmented.augment)(batch, jax.random.key(1))["image"]
    np.testing.assert_array_equal(seen, again)
    other = jax.jit(augmented.augment)(batch, jax.random.key(2))["image"]
    assert not np.array_equal(seen, other)
    values = np.asarray(seen) * 127.5 + 127.5
    np.testing.assert_allclose(values, values.round(), atol=1e-4)
    unchanged = np.asarray(plain.augment(batch, jax.random.key(1))["image"])
    np.testing.assert_array_equal(unchanged, plain.inputs(batch))
    np.testing.assert_array_equal(augmented.inputs(batch), unchanged)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"magnitud": 3}, "randaug.magnitud is unknown; did you mean 'magnitude'"),
        ({"magnitude": 31}, "magnitude=31: write a number from 0 to 30"),
        ({"num_layers": 0}, "num_layers=0: write 1 or more"),
        ({"corrected": 1}, "corrected=1: write true or false"),
        (
            {"magnitude": 9, "image": (8, 8, 1)},
            r"uint8 images of 3 channels, not uint8 \[8, 8, 1\]",
        ),
        ({"magnitude": 9, "dtype": np.float32}, "not float32 .*: leave value_range out"),
    ],
)
def test_wrong_fields_and_images(fields, message):
    with pytest.raises(UserError, match=message):
        build(**fields)


def test_numbers_without_names():
    spec = ArraySpec((8, 8, 3), np.dtype(np.uint8))
    with pytest.raises(UserError, match=r"randaug=\[2, 10\]: set one of its keys, num_layers"):
        _randaugment.check([2, 10], spec)


def test_augmenting_on_the_host_too_is_refused():
    config = config_lib.default_config()
    config.data.pp = "decode_jpeg_and_inception_crop(8)|randaug(2, 10)"
    config_lib.set_key(config, "task.randaug.magnitude", 10)
    with pytest.raises(UserError, match="would augment twice; leave one out"):
        config_lib.validate(config)
