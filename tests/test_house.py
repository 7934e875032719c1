"""The package keeps to the layout of the design; `scripts/house.py` prints the same counts."""

import importlib.util
import signal
from pathlib import Path

import mutations
import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "house.py"
spec = importlib.util.spec_from_file_location("house", SCRIPT)
house = importlib.util.module_from_spec(spec)
spec.loader.exec_module(house)


@pytest.mark.parametrize("bar", house.BARS)
def test_the_house_keeps_to_its_bars(bar):
    assert house.counts()[bar] <= house.BARS[bar]


def test_the_recorded_numbers_stay_small():
    files = (Path(__file__).parent / "golden").rglob("*")
    sizes = [p.stat().st_size for p in files if p.is_file() and p.parent.name != "__pycache__"]
    assert 0 < sum(sizes) < 12_000_000  # tests/golden/README.md says how to stay below.


def test_a_test_that_hangs_fails(pytestconfig):
    assert 0 < signal.alarm(300) <= 300  # The seconds that were left of the limit.
    assert 300 < float(pytestconfig.getini("faulthandler_timeout")) <= 900
    assert pytestconfig.getini("faulthandler_exit_on_timeout")
    with mutations.time_limit():
        assert 0 < signal.alarm(10) <= mutations.SECONDS
    assert mutations.SECONDS < signal.alarm(300) <= 300


@pytest.mark.usefixtures("one_device")
def test_a_batch_of_arrays_crosses_few_files(digits_npz, request):
    way, model = house.batch_way(f"{request.config.rootpath}/tests/tiny.py:{digits_npz}")
    assert len(way) <= 14, way  # The design asks for 13.
    assert model
