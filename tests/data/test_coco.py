"""COCO's JSON with a folder: the boxes that come out, and every broken file named in one line."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from vit_jax.config import load, validate
from vit_jax.data import eval_batches, open_source, train_batches
from vit_jax.errors import UserError
from vit_jax.training.run import Run

CONFIGS = Path(__file__).parents[2] / "configs"


def dataset(**changes):
    stored = {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 20, "height": 10},
            {"id": 3, "file_name": "b.png", "width": 8, "height": 8},
        ],
        "categories": [{"id": 90, "name": "dog"}, {"id": 2, "name": "cat"}],
        "annotations": [
            {"image_id": 7, "category_id": 90, "bbox": [5, 2, 10, 4], "area": 33.0},
            {"image_id": 7, "category_id": 2, "bbox": [0, 0, 20, 10], "iscrowd": 1},
        ],
    }
    return stored | changes


@pytest.fixture
def opened(tmp_path):
    def make(stored, split="train", **args):
        for name, size in (("a.png", (20, 10)), ("b.png", (8, 8))):
            Image.new("RGB", size).save(tmp_path / name)
        text = stored if isinstance(stored, str) else json.dumps(stored)
        (tmp_path / "train.json").write_text(text)
        args = {"images": str(tmp_path), "max_objects": 3} | args
        name = str(tmp_path / "{split}.json")
        return open_source({"source": "coco", "name": name, "split": split, **args})

    return make


def annotated(**changes):
    first, second = dataset()["annotations"]
    return dataset(annotations=[first | changes, second])


def test_boxes_are_corners_in_the_unpadded_image(opened):
    source = opened(dataset())
    assert source.class_names == ("cat", "dog")
    pp = "joint_decode|joint_fit(16)"
    (batch,) = eval_batches(source, batch_size=2, rows=np.arange(2), pp=pp)
    np.testing.assert_allclose(batch["boxes"][0, 0], [0.2, 0.25, 0.6, 0.75])
    np.testing.assert_array_equal(batch["box_label"], [[1, 0, -1], [-1, -1, -1]])
    np.testing.assert_array_equal(batch["box_crowd"][0], [False, True, False])
    np.testing.assert_array_equal(batch["box_area"][0], [33, 0, 0])
    np.testing.assert_array_equal(batch["image_size"], [[10, 20], [8, 8]])
    np.testing.assert_allclose(batch["content"], [[0.5, 1], [1, 1]])
    assert len(opened(dataset(), "train[1:]")) == 1


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ('{"images": [', "train.json is no JSON"),
        ("[]", "has no list 'images'"),
        (dataset(categories=[{"id": 1}]), r"categories\[0\] has no 'name'"),
        (annotated(image_id=5), r"annotations\[0\] is of image 5, which is not listed"),
        (annotated(category_id=5), r"annotations\[0\] has category 5, which is not listed"),
        (annotated(bbox=None), r"annotations\[0\] has bbox null"),
        (annotated(area=None), r"annotations\[0\] has area null"),
        (annotated(image_id=[1]), r"annotations\[0\] has image_id \[1\]"),
        (
            dataset(images=[{"id": 1, "file_name": "a.png", "width": None, "height": 8}]),
            r"images\[0\] has width null",
        ),
        (annotated(bbox=[1, 2, 3]), r"annotations\[0\] has bbox \[1, 2, 3\]"),
        (annotated(bbox=[1, 2, 0, 4]), "image 'a.png': object 0 has the box"),
        (annotated(bbox=[5, 5, -2, 2]), "image 'a.png': object 0 has the box"),
        (annotated(bbox=[5, 5, 30, 2]), "image 'a.png': object 0 has the box"),
        (annotated(bbox=[5, 5, float("nan"), 2]), "image 'a.png': object 0 has the box"),
    ],
)
def test_broken_files_are_named(opened, stored, message):
    with pytest.raises(UserError, match=message):
        opened(stored)


def test_bad_boxes_may_be_dropped_and_crowded_images_say_so(opened, caplog):
    source = opened(annotated(bbox=[1, 2, 0, 4]), on_bad_box="drop")
    assert (source.fetch(np.array([0]))["box_label"] >= 0).sum() == 1
    assert "boxes are left out" in caplog.text
    corners = dataset()
    for annotation in corners["annotations"]:
        annotation["bbox"] = [19, 19, 20, 20]
    with pytest.raises(UserError, match=r"not one of its \d boxes lies inside its image"):
        opened(corners, on_bad_box="drop")
    with pytest.raises(UserError, match="on_bad_box='ignore'; write fail or drop"):
        opened(dataset(), on_bad_box="ignore")
    with pytest.raises(UserError, match=r"a.png has 2 objects.*max_objects=1; write 2 or more"):
        opened(dataset(), max_objects=1)


def test_an_image_of_another_size_than_its_boxes_are_for_is_bad(tmp_path, opened):
    """As a photograph that EXIF turns: annotated upright, decoded lying on its side."""
    source = opened(dataset())
    turned = Image.Exif()
    turned[0x112] = 6
    for name in ("a.png", "b.png"):  # b has no boxes to be misplaced
        Image.new("RGB", (10, 20)).save(tmp_path / name, exif=turned)
    pp = "joint_decode|joint_fit(16)"
    reason = r"boxes are for\] \[10 20\] \[pixels but the image is\] \[20 10\]"
    options = {"batch_size": 2, "rows": np.arange(2), "pp": pp}
    with pytest.raises(UserError, match=rf"bad image .*a\.png: .*{reason}"):
        next(eval_batches(source, **options))
    with train_batches(source, seed=0, on_bad_image="skip", **options) as batches:
        assert (next(batches)["box_label"] == -1).all()
        assert batches.num_bad_images


def test_a_byte_order_mark_is_passed_over(opened):
    assert len(opened("\ufeff" + json.dumps(dataset()))) == 2


def test_missing_files(opened):
    with pytest.raises(UserError, match=r"val.json: No such file"):
        opened(dataset(), "val")
    with pytest.raises(UserError, match=r"no such folder: /nowhere"):
        opened(dataset(), images="/nowhere")


@pytest.mark.parametrize(("option", "proposals"), [("", 100), (",pyramid", 8**2 + 4**2 + 2**2)])
def test_the_recipe_fits_boxes_of_ones_own(tmp_path, opened, option, proposals):
    opened(dataset())
    given = f"json={tmp_path}/{{split}}.json,images={tmp_path},size=64{option}"
    config = load(f"{CONFIGS}/detect_coco.py:{given}").to_dict()
    config["batch_size"] = 8
    config["model"] |= {"width": 8, "depth": 1, "num_heads": 1, "mlp_dim": 8}
    config["data"]["args"]["max_objects"] = 3
    run = Run.build(validate(ConfigDict(config)))
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    params = {"params": run.abstract.params}
    scores, boxes = jax.eval_shape(run.task.model.apply, params, image)
    assert boxes.shape == (1, proposals, 4)
    assert scores.shape == (1, proposals, 2 + (not option))
