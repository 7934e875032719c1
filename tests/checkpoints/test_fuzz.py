"""Damage of every kind ends in one line: no traceback, no hang, no wrong array in silence."""

from pathlib import Path

import fuzzing
import pytest
from mutations import run_within_limits

# Reading Orbax costs some 50 times as much as reading a file.
COUNTS = {"npz": 100, "safetensors": 100, "pth": 100, "old_pth": 100, "hf": 100,
          "timm_folder": 100, "open_clip": 100, "orbax": 12}  # fmt: skip
SOAK = 20_000
SOAK_SHARE = {"orbax": 0.05}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    return fuzzing.write_seeds(tmp_path_factory.mktemp("seeds"))


@pytest.mark.parametrize("kind", COUNTS)
def test_damage_is_one_line(seeds, tmp_path, kind):
    for number in range(COUNTS[kind]):
        fuzzing.check(kind, Path(seeds[kind]), tmp_path / f"c{number}", number)


@pytest.mark.soak
@pytest.mark.parametrize("kind", COUNTS)
def test_much_damage_within_limits_of_memory_and_time(seeds, tmp_path, kind):
    """In a process of its own, whose address space is limited once everything is imported."""
    count = int(SOAK * SOAK_SHARE.get(kind, 1))
    setup = (
        f"import fuzzing; seed, folder = Path({str(seeds[kind])!r}), Path({str(tmp_path)!r})\n"
        "fuzzing.outcome(seed)"
    )
    loop = (
        f"for number in range({count}):\n"
        f"    fuzzing.check({kind!r}, seed, folder / f'c{{number}}', number)"
    )
    run_within_limits(setup, loop)
