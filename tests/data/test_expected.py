"""Shapes of batches that are told without data are those of the pipeline."""

import io

import numpy as np
import pytest
from PIL import Image

from vit_jax import data
from vit_jax.config import default_config, load
from vit_jax.data import expected
from vit_jax.data.expected import KNOWN
from vit_jax.recipes.imagenet import NUM_CLASSES, NUM_TRAIN, NUM_VALIDATION


def keys(**changes):
    return default_config().data.to_dict() | changes


@pytest.mark.parametrize(
    ("pp", "shape", "dtype"),
    [
        ("decode_jpeg_and_inception_crop(224)|flip_lr|randaug(2,10)", (224, 224, 3), np.uint8),
        ("decode|resize_small(256)|central_crop(224)|value_range(-1,1)", (224, 224, 3), np.float32),
        ("decode|resize(8)|clip_value_range", (8, 8, 3), np.float32),
        ("decode(1)|resize((8, 16))", (8, 16, 1), np.uint8),
    ],
)
def test_images(pp, shape, dtype):
    found = data.expect(keys(pp=pp, split="train[:90%]"))
    assert found.spec["image"][:2] == (shape, np.dtype(dtype))
    assert found.spec["label"][:2] == ((), np.dtype(np.int32))
    assert (len(found), found.num_classes) == (1_153_050, 1000)


def test_label_vectors_and_dropped_fields():
    found = data.expect(keys(pp='decode|resize(8)|onehot(1000, key="label")|keep("image","label")'))
    assert found.spec["label"][:2] == ((1000,), np.dtype(np.float32))
    assert data.expect(keys(pp='decode|resize(8)|drop("label")')).spec.keys() == {"image"}


def test_views_have_a_shape_of_their_own():
    local = "inception_crop(96)|flip_lr|gaussian_blur(0.5)"
    pp = f"decode|views('local', 8, '{local}')|inception_crop(224)"
    found = data.expect(keys(pp=pp)).spec
    shapes = {name: found[name].shape for name in ("image", "local")}
    assert shapes == {"image": (224, 224, 3), "local": (8, 96, 96, 3)}
    more = f"{pp}|views('local', 2, 'resize(96)')"
    assert data.expect(keys(pp=more)).spec["local"].shape == (10, 96, 96, 3)
    assert data.expect(keys(pp=pp.replace("flip_lr", "an_op_of_mine"))) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "my_own_dataset", "pp": "decode|resize(8)"},
        {"pp": "decode"},  # No size.
        {"pp": "decode|an_op_of_mine(3)"},
        {"pp": "decode|resize(8)", "split": "train+validation"},
        {"pp": "decode|resize(8)", "split": "minival"},
        {"source": "folder", "name": ".", "pp": "decode|resize(8)"},
        {"pp": "decode|resize(8)", "balance": 0.5},
    ],
)
def test_what_only_the_data_can_tell(changes):
    assert data.expect(keys(**changes)) is None


def test_made_up_data_is_as_its_source_says():
    args = {"num_examples": 640, "num_classes": 7, "encoded": True}
    pp = "decode_jpeg_and_inception_crop(32)"
    spec = keys(source="fake", args=args, pp=pp, split="train[:50%]")
    found = data.expect(spec)
    own = {key: spec[key] for key in ("source", "name", "split")}
    source = data.open_source({**own, **args})
    assert (len(found), found.num_classes) == (len(source), source.num_classes)
    assert {k: v[:2] for k, v in found.spec.items()} == {
        k: v[:2] for k, v in data.element_spec(source, pp).items()
    }


class OneRecord:
    """A source of one record of `fields`: every picture is a PNG of 5×4 pixels."""

    def __init__(self, fields):
        picture = io.BytesIO()
        Image.new("L", (5, 4)).save(picture, "png")
        self._record = {}
        for key, array in fields.items():
            if key == "image" or (array.dtype == object and not array.shape):
                self._record[key] = np.array([picture.getvalue()], object)
            elif array.dtype == object:
                self._record[key] = np.full((1, *array.shape), b"a 3", object)
            else:
                self._record[key] = np.zeros((1, *array.shape), array.dtype)

    def __len__(self):
        return 1

    def fetch(self, indices):
        return self._record

    def describe(self, index):
        return "the record"


@pytest.mark.parametrize(
    ("recipe", "dataset"),
    [
        ("segment_ade20k.py", "scene_parse150"),
        ("segment_ade20k.py:data=pets", "oxford_iiit_pet"),
        ("detect_coco.py", "coco/2017"),
        ("lit_coco.py", "coco_captions"),
    ],
)
def test_dense_and_captioned_recipes(request, recipe, dataset):
    config = load(f"{request.config.rootpath}/configs/{recipe}")
    found = data.expect(config.data.to_dict())
    known = KNOWN[dataset]
    assert (len(found), found.num_classes) == (known.splits["train"], known.num_classes)
    assert config.data.name == dataset
    source = OneRecord(expected.records_of(known, config.data.args.to_dict()))
    assert found.spec == data.element_spec(source, config.data.pp)


def test_counts_agree_with_the_recipes():
    known = KNOWN["imagenet2012"]
    assert known.num_classes == NUM_CLASSES
    assert known.splits == {"train": NUM_TRAIN, "validation": NUM_VALIDATION}


def test_value_ops_are_those_of_their_module():
    from vit_jax.data import ops, pp

    found = [ops.find_op(name) for name in ops.OPS.names()]
    defined = {op.name for op in found if op.function.__module__.endswith(".values")}
    assert set(pp.VALUE_OPS) == defined
