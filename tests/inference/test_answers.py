"""The pictures that answers are drawn on are those that were given, as far as they were seen."""

import numpy as np
import pytest
from PIL import Image

from vit_jax.data.placement import Placement
from vit_jax.inference.answers import Answers
from vit_jax.inference.preparation import Pictures

PHOTO = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
PREPARED = np.zeros((8, 8, 3), np.uint8)


def answers(photo):
    return Answers(Pictures([photo]), {"image": PREPARED[None]}, {}, [None])


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (Placement((5, 5), (0, 10), (40, 60)), PHOTO[:, 10:50]),  # Resized, then cut.
        (Placement((0.5, 0.5), (0, 10), (40, 60)), PREPARED),  # Enlarged.
        (Placement((5, -5), (0, 50), (40, 60)), PREPARED),  # Turned over.
        (Placement((5, 10), (0, -10), (40, 60)), PREPARED),  # Padded.
        (None, PREPARED),
    ],
)
def test_the_part_of_a_photograph_that_was_seen_is_shown(place, expected):
    class Preparation:
        def placement(self, pictures, number):
            return place

    (view,) = answers(PHOTO).views(Preparation())
    np.testing.assert_array_equal(view, expected)


def test_large_photographs_are_reduced_and_have_the_names_of_their_files(tmp_path):
    Image.new("RGB", (2000, 1000)).save(tmp_path / "cat.jpg")
    found = answers(str(tmp_path / "cat.jpg"))
    assert [photo.shape for photo in found.photographs()] == [(256, 512, 3)]
    assert found.names() == ["cat.jpg"]
