import pathlib
import sys

import pytest

# Several tests of this folder share odd files.
sys.path.insert(0, str(pathlib.Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def cached_indices(tmp_path_factory):
    """Indices of tar files are kept below the tests' own folder."""
    from vit_jax.data.sources import _tar_index

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_tar_index, "CACHE", str(tmp_path_factory.mktemp("indices")))
        yield


@pytest.fixture
def folder(tmp_path):
    """Returns a folder of six images, whose pixels tell their number."""
    from image_tables import NAMES, png

    for number, name in enumerate(NAMES):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(10 * number))
    return tmp_path


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Returns the folder of the digits, prepared as a TFDS dataset."""
    from vit_jax.data.prepare import prepare

    folder = tmp_path_factory.mktemp("tfds")
    prepare("digits", str(folder))
    return str(folder)
