"""Damage of every kind ends in one line: no traceback, no hang, no wrong array in silence."""

import subprocess
import sys
from pathlib import Path

import fuzzing
import pytest

# Reading Orbax costs some 50 times as much as reading a file.
COUNTS = {"npz": 100, "safetensors": 100, "pth": 100, "old_pth": 100, "hf": 100,
          "timm_folder": 100, "orbax": 12}  # fmt: skip
SOAK = 20_000
SOAK_SHARE = {"orbax": 0.05}

EXTRA_MEMORY = 1 << 30
"""Bytes that reading a small damaged checkpoint may take at most."""


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
    code = (
        "import resource, sys; from pathlib import Path\n"
        f"sys.path = {sys.path}\n"
        "import fuzzing\n"
        f"seed, folder = Path({str(seeds[kind])!r}), Path({str(tmp_path)!r})\n"
        "fuzzing.outcome(seed)\n"
        "pages = int(Path('/proc/self/statm').read_text().split()[0])\n"
        f"limit = pages * resource.getpagesize() + {EXTRA_MEMORY}\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        f"for number in range({count}):\n"
        f"    fuzzing.check({kind!r}, seed, folder / f'c{{number}}', number)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
