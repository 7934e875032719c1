"""COCO's JSON with a folder: the boxes that come out, and every broken file named in one line."""

import json
from pathlib import Path

import jax
import numpy as np
import odd_images
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
        (annotated(image_id=5), r"annotations\[0\] is of image 5, which is not listed$"),
        (annotated(image_id="7"), r"is of image \"7\", which is not listed \(ids are written as"),
        (annotated(category_id=5), r"annotations\[0\] is of category 5, which is not listed"),
        (annotated(category_id=True), r"annotations\[0\] has category_id true"),
        (dataset(categories=[{"id": 1, "name": "a"}, {"id": "1", "name": "b"}]), "numbers and te"),
        (dataset(categories=[{"id": 1, "name": "a"}] * 2), r"categories\[0\] have the same id 1"),
        (
            dataset(images=[dataset()["images"][0], dataset()["images"][1] | {"id": 7}]),
            r"images\[1\] and images\[0\] have the same id 7",
        ),
        (
            dataset(
                images=[dataset()["images"][0], dataset()["images"][1] | {"file_name": "./a.png"}]
            ),
            r"images\[1\] and images\[0\] have the same file_name \"a.png\"",
        ),
        (
            dataset(annotations=[one | {"id": 4} for one in dataset()["annotations"]]),
            r"annotations\[1\] and annotations\[0\] have the same id 4",
        ),
        (annotated(bbox=[5, 5, 10**30, 2]), r"annotations\[0\] has bbox \[5, 5, 1000"),
        ("[" * 100_000, "is no JSON: brackets nested too deep"),
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
    with pytest.raises(UserError, match="on_bad_box='ignore'; write fail, clip, drop"):
        opened(dataset(), on_bad_box="ignore")
    with pytest.raises(UserError, match=r"a.png has 2 objects.*max_objects=1; write 2 or more"):
        opened(dataset(), max_objects=1)


def test_an_image_of_another_size_than_its_boxes_are_for_is_bad(tmp_path, opened):
    source = opened(dataset())
    for name in ("a.png", "b.png"):  # b has no boxes to be misplaced
        Image.new("RGB", (10, 20)).save(tmp_path / name)
    pp = "joint_decode|joint_fit(16)"
    reason = r"boxes are for\] \[10 20\] \[pixels but the image is\] \[20 10\]"
    options = {"batch_size": 2, "rows": np.arange(2), "pp": pp}
    with pytest.raises(UserError, match=rf"bad image .*a\.png: .*{reason}"):
        next(eval_batches(source, **options))
    with train_batches(source, seed=0, on_bad_image="skip", **options) as batches:
        assert (next(batches)["box_label"] == -1).all()
        assert batches.num_bad_images


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.png", "a/../../x.png", ".", "", "a\0b"])
def test_files_outside_the_folder_are_refused(opened, name):
    images = [dataset()["images"][0] | {"file_name": name}]
    with pytest.raises(UserError, match=r"images\[0\] names the file .* not in the folder"):
        opened(dataset(images=images, annotations=[]))


def test_absolute_paths_and_detours_inside_the_folder_are_followed(tmp_path, opened):
    first, second = dataset()["images"]
    images = [first | {"file_name": f"{tmp_path}/a.png"}, second | {"file_name": "c/../b.png"}]
    source = opened(dataset(images=images))
    assert [source.describe(i) for i in range(2)] == [f"{tmp_path}/a.png", f"{tmp_path}/b.png"]
    assert len(source.fetch(np.arange(2))["image"]) == 2


def test_a_link_to_what_is_no_image_is_a_bad_image(tmp_path, opened):
    source = opened(dataset())
    (tmp_path / "a.png").unlink()
    (tmp_path / "a.png").symlink_to("/etc/passwd")
    with pytest.raises(OSError, match="not an image that is read"):
        source.fetch(np.array([0]))


def test_a_box_that_reaches_one_pixel_beyond_the_image_is_cut(opened):
    source = opened(annotated(bbox=[11, 5, 10, 6]))
    np.testing.assert_allclose(source.fetch(np.array([0]))["boxes"][0, 0], [0.5, 0.55, 1, 1])


@pytest.mark.parametrize(
    ("bbox", "cut"),
    [
        ([-5, -5, 10, 10], [0, 0, 0.5, 0.25]),
        ([10, 5, 300, 200], [0.5, 0.5, 1, 1]),
        ([25, 5, 5, 2], None),
        ([5, 5, 0, 2], None),
        ([5, 5, -5, 2], None),
        ([5, 5, float("nan"), 2], None),
        ([5, 5, float("inf"), 2], None),
    ],
)
def test_boxes_may_be_clipped_to_their_image(opened, bbox, cut):
    records = opened(annotated(bbox=bbox), on_bad_box="clip").fetch(np.array([0]))
    labels = records["box_label"][0]
    assert labels.tolist() == ([1, 0, -1] if cut else [0, -1, -1])
    if cut:
        np.testing.assert_allclose(records["boxes"][0, 0], cut)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("exif", ["apply", "ignore"])
def test_boxes_lie_on_the_photograph_that_they_were_drawn_on(tmp_path, opened, orientation, exif):
    """A square photograph: its size does not tell which of its sides is up."""
    upright = np.zeros((16, 16, 3), np.uint8)
    upright[2:6, 4:14] = 255  # Where the first box is.
    images = [dataset()["images"][0] | {"width": 16, "height": 16}]
    stored = annotated(bbox=[4, 2, 10, 4])
    stored = stored | {"images": images, "annotations": stored["annotations"][:1]}
    source = opened(stored, exif=exif)
    photograph = odd_images.turned(Image.fromarray(upright), orientation, quality=95)
    if exif == "ignore":
        exif_of_another = Image.Exif()
        exif_of_another[0x0112] = orientation
        photograph = odd_images.encoded(
            Image.fromarray(upright), "JPEG", quality=95, exif=exif_of_another
        )
    (tmp_path / "a.png").write_bytes(photograph)
    (batch,) = eval_batches(source, batch_size=1, rows=np.arange(1), pp="joint_decode")
    y0, x0, y1, x1 = np.round(batch["boxes"][0, 0] * 16).astype(int)
    inside = batch["image"][0, y0:y1, x0:x1]
    assert inside.mean() > 200
    assert inside.sum() > 0.9 * batch["image"].sum()


def test_boxes_for_the_photograph_as_stored_keep_it_so(tmp_path, opened):
    """The JSON lists 20 x 10 pixels, as the file has them before it is turned."""
    source = opened(dataset())
    data = odd_images.turned(odd_images.photograph(10, 20), 6)
    (tmp_path / "a.png").write_bytes(data)
    assert source.fetch(np.array([0]))["image"][0] == data


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
