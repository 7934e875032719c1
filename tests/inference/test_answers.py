"""The pictures that answers are drawn on are those that were given, as far as they were seen."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from vit_jax import tasks
from vit_jax.data.placement import Placement
from vit_jax.inference.answers import Answers
from vit_jax.inference.predict import Predictor
from vit_jax.inference.preparation import Pictures
from vit_jax.types import ArraySpec, DataInfo

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


@pytest.mark.parametrize(
    ("settings", "outputs"),
    [
        (
            {"name": "masked", "decoder": {"width": 8, "depth": 1, "num_heads": 1}},
            ("masked", "reconstructed"),
        ),
        ({"name": "simmim", "cell": 4}, ("rebuilt",)),
    ],
)
def test_reconstructions_are_drawn_beside_what_the_model_was_given(tmp_path, settings, outputs):
    model = {"name": "vit", "patch_size": 4, "width": 8, "depth": 1, "num_heads": 1}
    spec = {"image": ArraySpec((8, 8, 3), np.dtype(np.uint8))}
    task = tasks.build(settings, model, DataInfo(spec, 0))
    found = {**dict.fromkeys(outputs, PREPARED[None]), "error": np.zeros(1)}
    drawn = dataclasses.replace(answers(PHOTO), outputs=found)
    Predictor(task, {}, task.info, None).draw(drawn, str(tmp_path / "drawn.png"))
    assert min(Image.open(tmp_path / "drawn.png").size) > 50
