"""ImageNet as a folder, with all that is odd in the real one, and the further test sets' labels."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from vit_jax import tasks
from vit_jax.data import eval_batches, open_source, pp, train_batches
from vit_jax.data.host_tensorflow import tf
from vit_jax.data.ops.subsets import allowed_classes
from vit_jax.errors import UserError
from vit_jax.recipes import imagenet
from vit_jax.training.evaluate import Evaluator
from vit_jax.training.run import Run
from vit_jax.types import ArraySpec, DataInfo

NUM_CLASSES = 1000


def image_bytes(random, kind="JPEG", mode="RGB"):
    height, width = random.integers(6, 20, 2)
    pixels = random.integers(0, 256, (height, width, 4 if mode == "CMYK" else 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels, mode).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """1,000 classes with an image each in train, every tenth in val; CMYK, PNG and broken ones."""
    root = tmp_path_factory.mktemp("imagenet")
    random = np.random.default_rng(0)
    usual = [image_bytes(random) for _ in range(20)]
    for number in range(NUM_CLASSES):
        synset = f"n{number + 1_440_764:08d}"
        for split in ("train", "val")[: 1 + (number % 10 == 0)]:
            path = root / split / synset
            path.mkdir(parents=True)
            (path / f"{synset}_1.JPEG").write_bytes(usual[number % len(usual)])
    odd = sorted((root / "train").iterdir())
    (odd[3] / "cmyk.JPEG").write_bytes(image_bytes(random, mode="CMYK"))
    (odd[4] / "png.JPEG").write_bytes(image_bytes(random, kind="PNG"))
    (odd[5] / "broken.JPEG").write_bytes(usual[0][:60])
    return root


TRAIN_PP = "decode_jpeg_and_inception_crop(8)|flip_lr"


def test_a_folder_of_imagenets_shape_is_used_as_it_is(folder):
    source = open_source({"source": "folder", "name": str(folder), "split": "train"})
    assert (len(source), source.num_classes) == (1003, NUM_CLASSES)
    assert source.class_names == tuple(sorted(source.class_names))
    validation = open_source({"source": "folder", "name": str(folder), "split": "validation"})
    assert len(validation) == 100
    assert validation.class_names == source.class_names
    keys = {"batch_size": 128, "rows": np.arange(128), "seed": 0, "pp": TRAIN_PP}
    with train_batches(source, **keys, on_bad_image="skip") as batches:
        labels = np.concatenate([next(batches)["label"] for _ in range(8)])
        assert batches.num_bad_images == 1
        assert "broken.JPEG" in batches.bad_images[0]
    assert len(np.unique(labels)) > 0.95 * NUM_CLASSES


def test_minival_is_a_hundredth_of_the_folder_and_not_trained_on(folder):
    def names(split):
        source = open_source({"source": "folder", "name": str(folder), "split": split})
        return {source.describe(i) for i in range(len(source))}

    held_out = names(imagenet.MINIVAL)
    assert len(held_out) == 10
    assert not held_out & names("train[:99%]")


class TinyReal(tfds.core.GeneratorBasedBuilder):
    """The features of TFDS's `imagenet2012_real`."""

    VERSION = tfds.core.Version("1.0.0")
    LABELS = ([3], [], [7, 999], [0, 1, 2])

    def _info(self):
        label = tfds.features.ClassLabel(num_classes=NUM_CLASSES)
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "original_label": label,
            "real_label": tfds.features.Sequence(label),
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"validation": self._generate_examples()}

    def _generate_examples(self):
        for number, labels in enumerate(self.LABELS):
            image = np.full((20, 24, 3), 40 * number, np.uint8)
            yield number, {"image": image, "original_label": number, "real_label": labels}


def test_real_counts_any_of_its_labels_and_leaves_out_images_without(tmp_path):
    builder = TinyReal(data_dir=tmp_path)
    builder.download_and_prepare(file_format="array_record")
    spec = {"source": "tfds", "name": "tiny_real", "dir": str(tmp_path), "split": "validation"}
    source = open_source(spec)
    steps = "decode|resize_small(16)|central_crop(16)" + imagenet.OTHER_SETS["real"][2]
    (batch,) = eval_batches(source, batch_size=5, rows=np.arange(5), pp=steps)
    given = {tuple(np.flatnonzero(row)) for row in batch["label"][:4]}
    assert given == {tuple(labels) for labels in TinyReal.LABELS}

    answers = {(3,): 3, (): 5, (7, 999): 999, (0, 1, 2): 3}  # Right, left out, right, wrong.
    chosen = [answers[tuple(np.flatnonzero(row))] for row in batch["label"][:4]]
    assert metrics_of(np.eye(NUM_CLASSES)[[*chosen, 0]], batch)["accuracy"] == pytest.approx(2 / 3)


def metrics_of(logits, batch):
    """The metrics of a model that answers with `logits`."""

    class Constant:
        def apply(self, _, images):
            return jnp.asarray(logits, jnp.float32)

    spec = {
        "image": ArraySpec((16, 16, 3), np.dtype(np.uint8)),
        "label": ArraySpec((), np.dtype(np.int32)),
    }
    model = {"name": "vit", "width": 8, "depth": 1, "num_heads": 1, "patch_size": 16}
    task = tasks.build({"name": "classification"}, model, DataInfo(spec, NUM_CLASSES))
    object.__setattr__(task, "model", Constant())
    return task.metrics(jax.device_get(task.eval_sums({}, batch)))


@pytest.mark.parametrize("dataset", ["imagenet_a", "imagenet_r"])
def test_only_the_classes_of_the_set_are_answers(dataset):
    allowed = allowed_classes(dataset)
    assert allowed.sum() == 200
    inside, outside = np.flatnonzero(allowed)[:2], np.flatnonzero(allowed == 0)[0]
    logits = np.zeros((2, NUM_CLASSES), np.float32)
    logits[:, outside] = 9  # Would be wrong.
    logits[0, inside[0]], logits[1, inside[1]] = 5, 5
    batch = {
        "image": np.zeros((2, 16, 16, 3), np.uint8),
        "label": inside[:1].repeat(2).astype(np.int32),
        "mask": np.ones(2, np.float32),
    }
    assert metrics_of(logits, batch)["accuracy"] == 0
    found = metrics_of(logits, batch | {"allowed": np.stack([allowed, allowed])})
    assert found["accuracy"] == 0.5
    among = np.exp(5) / (np.exp(5) + 199)
    expected = -(np.log(among) + np.log(1 / (np.exp(5) + 199))) / 2
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)


def test_the_op_adds_the_classes():
    build = pp.build('only_classes("imagenet_r")')
    record = build({"image": np.zeros((2, 2, 3), np.uint8)}, np.zeros(2, np.int32))
    np.testing.assert_array_equal(record["allowed"], allowed_classes("imagenet_r"))
    with pytest.raises(UserError, match=r"did you mean 'imagenet_[ar]'"):
        pp.build('only_classes("imagenet_b")')({"image": np.zeros(1)}, np.zeros(2, np.int32))


def test_grey_images_get_three_equal_channels():
    make = pp.build("rgb")
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
    made = make({"image": tf.constant(grey)}, np.zeros(2, np.int32))["image"]
    np.testing.assert_array_equal(made, np.repeat(grey, 3, axis=-1))
    colour = tf.constant(np.repeat(grey, 3, axis=-1))
    assert make({"image": colour}, np.zeros(2, np.int32))["image"] is colour


def test_a_set_with_other_classes_is_not_scored(digits_npz, tiny_config, tmp_path):
    fewer = tmp_path / "fewer.npz"
    np.savez(fewer, image=np.zeros((4, 8, 8, 1), np.uint8), label=np.arange(4))
    entry = {"split": "train", "name": str(fewer)}
    config = tiny_config(eval__sets__other=entry)
    run = Run.build(config)
    with pytest.raises(UserError, match=r"eval\.sets\.other has 4 classes, config\.data has 10"):
        Evaluator(config, run.task, run.abstract, run.mesh)


@pytest.mark.parametrize("name", imagenet.OTHER_SETS)
def test_further_sets_exist_in_tfds_with_the_thousand_classes(name):
    dataset, split, steps = imagenet.OTHER_SETS[name]
    builder = tfds.builder(dataset, try_gcs=False)
    labels = builder.info.features["real_label" if name == "real" else "label"]
    assert getattr(labels, "feature", labels).num_classes == NUM_CLASSES
    ours = tfds.builder("imagenet2012", try_gcs=False).info.features["label"].names
    assert getattr(labels, "feature", labels).names == ours
    assert split in ("validation", "test")
    pp.parse("decode" + steps)


# As published, at a size that is cheap to crop to.
PUBLISHED_PP = [
    "decode_jpeg_and_inception_crop(16)|flip_lr|randaug(2,10)",
    "decode_jpeg_and_inception_crop(16, 8, method='bicubic', antialias=True)|flip_lr"
    "|three_augment|color_jitter(0.3, 0.3, 0.3)",
    "decode|resize_small(16, 'bicubic', True)|central_crop(16)",
]


@pytest.mark.parametrize("steps", PUBLISHED_PP)
def test_preprocessing_of_the_recipes_takes_every_kind_of_file(folder, steps):
    source = open_source({"source": "folder", "name": str(folder), "split": "train[:3%]"})
    keys = {"batch_size": 16, "rows": np.arange(16), "seed": 0, "pp": steps}
    with train_batches(source, **keys, on_bad_image="skip") as batches:
        batch = next(batches)
    assert (batch["image"].shape, batch["image"].dtype) == ((16, 16, 16, 3), np.uint8)
