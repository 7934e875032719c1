"""Damaged input ends in one line: no traceback, no hang, no wrong value in silence."""

import damaged_input
import pytest
from mutations import run_within_limits

# TensorFlow's reader of records starts threads for every file.
COUNTS = dict.fromkeys(damaged_input.kinds(), 200) | {"tfrecord_check": 50}
SOAK = 20_000


@pytest.mark.parametrize("kind", COUNTS)
def test_damage_is_one_line(tmp_path, kind):
    damaged_input.write_rest(tmp_path)
    for number in range(COUNTS[kind]):
        damaged_input.check(damaged_input.kinds()[kind], tmp_path, number)


@pytest.mark.parametrize("kind", COUNTS)
def test_seeds_are_read(tmp_path, kind):
    """Otherwise damage would be refused for another reason."""
    damaged_input.write_rest(tmp_path)
    given = damaged_input.kinds()[kind]
    (tmp_path / given.file).write_bytes(given.seed)
    if kind == "parquet_pages":
        with pytest.raises(AssertionError, match="was read"):
            given.read(tmp_path / given.file)
    elif kind != "imagenet_tar":  # ImageNet has more images.
        assert given.read(tmp_path / given.file) is not None


@pytest.mark.soak
@pytest.mark.parametrize("kind", COUNTS)
def test_much_damage_within_limits_of_memory_and_time(tmp_path, kind):
    """Runs in a process of its own, with a limited address space once everything is imported."""
    setup = (
        f"import damaged_input; kind = damaged_input.kinds()[{kind!r}]\n"
        f"folder = Path({str(tmp_path)!r}); damaged_input.write_rest(folder)\n"
        "damaged_input.check(kind, folder, 0)"
    )
    run_within_limits(setup, f"for n in range({SOAK}): damaged_input.check(kind, folder, n)")
