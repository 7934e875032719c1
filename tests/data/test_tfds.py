"""TFDS at random access, and the digits that we ship as a TFDS builder."""

from types import SimpleNamespace

import numpy as np
import odd_images
import pytest
from sklearn.datasets import load_digits
from stored_digits import NUM_TRAIN, open_digits

from vit_jax.data import class_counts, element_spec, eval_batches, open_source
from vit_jax.data.sources import tfds as tfds_source
from vit_jax.data.sources._splits import select
from vit_jax.errors import UserError


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return np.round(data.images * (255 / 16)).astype(np.uint8)[..., None], data.target


@pytest.mark.parametrize(
    ("split", "rows"),
    [
        ("train", range(NUM_TRAIN)),
        ("test", range(NUM_TRAIN, 1797)),
        ("train[:80%]", range(1150)),
        ("train[1150:]", range(1150, NUM_TRAIN)),
    ],
)
def test_digits_are_those_of_scikit_learn_in_writer_order(data_dir, digits, split, rows):
    images, labels = digits
    source = open_digits(data_dir, split)
    assert len(source) == len(rows)
    assert source.num_classes == 10
    assert source.class_names == tuple("0123456789")
    assert split in source.fingerprint
    seen = list(eval_batches(source, batch_size=400, rows=np.arange(400)))
    real = np.concatenate([batch["mask"] for batch in seen]) == 1
    np.testing.assert_array_equal(
        np.concatenate([batch["image"] for batch in seen])[real], images[rows.start : rows.stop]
    )
    np.testing.assert_array_equal(
        np.concatenate([batch["label"] for batch in seen])[real], labels[rows.start : rows.stop]
    )
    assert seen[0].keys() == {"image", "label", "mask"}


def test_folds_and_parts_of_classes_are_those_of_the_labels(data_dir, digits, monkeypatch):
    labels = digits[1][:NUM_TRAIN]
    for split in ("train[fold 2 of 5]", "train[all but fold 2 of 5][3 per class]"):
        source, rows = open_digits(data_dir, split), select(split, labels)
        assert len(source) == len(rows)
        np.testing.assert_array_equal(source.labels, labels[rows])
        assert class_counts(source) == tuple(np.bincount(labels[rows]))
        np.testing.assert_array_equal(source.fetch(np.arange(5))["image"], digits[0][rows[:5]])
        assert source.describe(3) == f"record {rows[3]} of TFDS digits/2.0.0 {split}"
    # Labels are read once, and kept beside the dataset.
    monkeypatch.setattr(tfds_source, "_chunks", None)
    assert len(open_digits(data_dir, "train[1% per class]")) == 10
    spec = {"source": "tfds", "name": "digits", "dir": data_dir, "split": "train[:100]"}
    assert class_counts(open_source(spec)) == ()
    monkeypatch.undo()
    assert sum(class_counts(open_source(spec | {"count_labels": True}))) == 100


@pytest.fixture
def reads_labels(tmp_path):
    """A function that returns the labels of a split, which it reads from its shard or keeps."""
    shard = tmp_path / "digits-train.array_record-00000-of-00001"
    split = SimpleNamespace(file_instructions=[SimpleNamespace(filename=str(shard))])
    info = SimpleNamespace(splits={"train": split}, full_name="digits/2.0.0")

    class Shard:
        def __len__(self):
            return shard.stat().st_size

        def __getitems__(self, numbers):
            return [{"label": shard.read_bytes()[number]} for number in numbers]

    def read(*labels):
        if labels:
            shard.write_bytes(bytes(labels))
        source = object.__new__(tfds_source.Source)
        source._features, source._reader, source._name = {"label": np.int32}, Shard(), "digits"
        builder = SimpleNamespace(data_path=tmp_path, info=info)
        return source._read_labels(builder, "train").tolist()

    read.shard = shard
    return read


def test_labels_are_read_anew_when_the_records_are_written_anew(reads_labels, monkeypatch):
    assert reads_labels(1, 2, 0) == [1, 2, 0]
    with monkeypatch.context() as patch:
        patch.setattr(tfds_source, "_chunks", None)
        assert reads_labels() == [1, 2, 0]
    assert reads_labels(0, 2, 1) == [0, 2, 1]
    # As an earlier version kept them, without a stamp.
    (kept,) = reads_labels.shard.parent.glob("labels-*")
    np.save(kept, np.array([5, 5, 5], np.int32))
    assert reads_labels() == [0, 2, 1]


class Records(list):
    def __getitems__(self, rows):
        return [self[row] for row in rows]


@pytest.mark.parametrize("kind", [tfds_source._Class(3), tfds_source._MultiHot(3)])
def test_a_split_without_labels_has_none_and_a_record_without_one_is_named(kind):
    def record(label):
        return {"x": 1, "label": label if isinstance(kind, tfds_source._Class) else [label]}

    features = {"x": np.int64, "label": kind}
    for labels, lacking in (([-1, -1], ["label"]), ([0, -1], []), ([2, 3], []), ([], [])):
        records = [record(label) for label in labels]
        reader = Records(records)
        assert tfds_source._unlabeled(features, reader) == lacking
        source = object.__new__(tfds_source.Source)
        source._features, source._reader, source._name = features, reader, "digits train"
        source._objects = ""
        if labels and not lacking:
            message = rf"record 1 of TFDS digits train has the label {labels[1]}, which is none of"
            with pytest.raises(UserError, match=message):
                source._read(np.arange(2))


def test_labels_that_are_kept_of_one_part_of_a_split_are_not_those_of_another(data_dir, digits):
    for split, rows in (("test[:50%]", slice(0, 180)), ("test[50%:]", slice(180, 360))):
        source = open_source(
            {"source": "tfds", "name": "digits", "dir": data_dir, "split": split,
             "count_labels": True}
        )  # fmt: skip
        np.testing.assert_array_equal(source.labels, digits[1][NUM_TRAIN:][rows])


def test_records_are_fetched_in_the_order_asked_for(data_dir):
    records = open_digits(data_dir).fetch(np.array([7, 3, 7]))
    assert records["id"].tolist() == [b"7", b"3", b"7"]
    assert records["label"].dtype == np.int32
    assert records["image"].dtype == np.uint8


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Twelve PNG images in TFDS form, as most of its datasets hold theirs."""
    import tensorflow_datasets as tfds

    from vit_jax.data.prepare import prepare

    class Pictures(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                "label": tfds.features.ClassLabel(num_classes=3),
                "captions": tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()}),
                "words": tfds.features.Sequence(tfds.features.Text()),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number in range(12):
                image = np.full((4 + number, 6, 3), number, np.uint8)
                texts = [f"{number} {i}" for i in range(number % 4)]
                captions = [{"id": 0, "text": text} for text in texts]
                yield (
                    number,
                    {"image": image, "label": number % 3, "captions": captions, "words": texts},
                )

    folder = str(tmp_path_factory.mktemp("pictures"))
    prepare("pictures", folder)
    spec = {"source": "tfds", "name": "pictures", "dir": folder, "split": "train"}
    return open_source({**spec, "max_texts": 2})


def test_lists_of_texts_are_as_long_as_each_other(pictures):
    records = pictures.fetch(np.array([4, 5, 7]))
    expected = [[b"", b""], [b"5 0", b""], [b"7 0", b"7 1"]]
    np.testing.assert_array_equal(records["captions"], expected)
    np.testing.assert_array_equal(records["words"], expected)


def test_images_stay_encoded_until_preprocessing_decodes_them(pictures):
    records = pictures.fetch(np.array([7, 3, 7]))
    assert records["image"].dtype == object
    assert all(image.startswith(b"\x89PNG") for image in records["image"])
    (batch,) = eval_batches(pictures, batch_size=12, rows=np.arange(12), pp="decode|resize(8)")
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], range(12))


def test_half_a_jpeg_fails_wherever_the_crop_lies(pictures, monkeypatch):
    from vit_jax.data import pp
    from vit_jax.data.host_tensorflow import tf

    jpeg = odd_images.encoded(odd_images.photograph(200, 160), "JPEG")
    (example,) = pictures._reader.__getitems__([0])
    examples = [example | {"image": data} for data in (jpeg, jpeg[: len(jpeg) // 2])]
    reader = SimpleNamespace(__getitems__=lambda _: examples)
    monkeypatch.setattr(pictures, "_reader", reader)
    whole, half = pictures._read(np.arange(2))["image"]
    assert whole is jpeg
    crop = pp.build("decode_jpeg_and_inception_crop(8)")
    for seed in range(20):
        with pytest.raises(UserError):
            crop({"image": tf.constant(half)}, np.array([seed, 0], np.int32))


def test_encoded_images_need_decoding(pictures):
    with pytest.raises(UserError, match="begin the preprocessing with 'decode'"):
        element_spec(pictures)
    with pytest.raises(UserError, match=r"'flip_lr\(\)'.*put 'decode' before"):
        element_spec(pictures, "flip_lr()")


def test_preparing_twice_keeps_the_first(data_dir):
    from pathlib import Path

    from vit_jax.data.prepare import prepare

    def state():
        return {path: path.stat().st_mtime_ns for path in Path(data_dir).rglob("*")}

    before = state()
    folder = prepare("digits", data_dir)
    assert state() == before
    assert Path(folder).is_dir()


def test_interrupted_preparation_leaves_no_dataset(tmp_path, monkeypatch):
    from vit_jax.data.builders.digits import Digits
    from vit_jax.data.prepare import prepare

    def break_off(self, images, labels, rows):
        yield 0, {"image": images[0], "label": 0, "id": "0"}
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Digits, "_generate_examples", break_off)
        with pytest.raises(UserError, match="could not be prepared: no space left"):
            prepare("digits", str(tmp_path))
    with pytest.raises(UserError, match="not prepared"):
        open_digits(str(tmp_path))
    prepare("digits", str(tmp_path))
    assert len(open_digits(str(tmp_path))) == NUM_TRAIN


def test_code_that_a_dataset_names_does_not_run(data_dir, tmp_path, monkeypatch):
    from pathlib import Path

    from vit_jax.data.prepare import find_builder

    (source,) = Path(data_dir).glob("digits/*")
    copy = tmp_path / "theirs" / source.name
    copy.mkdir(parents=True)
    info = (
        (source / "dataset_info.json").read_text().replace('"name": "digits"', '"name": "theirs"')
    )
    (copy / "dataset_info.json").write_text(info)
    features = (source / "features.json").read_text()
    ours = "tensorflow_datasets.core.features.text_feature.Text"
    assert ours in features
    (copy / "features.json").write_text(features.replace(ours, "their_features.Text"))
    (tmp_path / "their_features.py").write_text("raise SystemExit('it runs')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"'their_features.Text', which is code from outside TFDS"):
        find_builder("theirs", str(tmp_path))


def test_missing_dataset_says_how_to_prepare_it(tmp_path):
    with pytest.raises(UserError, match=r"python -m vit_jax prepare digits --data_dir=\S+"):
        open_digits(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "digts"}, "did you mean 'digits'"),
        ({"name": "digits:9.9.9"}, "cannot be loaded at version 9.9.9"),
        ({"split": "trian"}, "did you mean 'train'"),
        ({"split": "train[a]"}, "has no split"),
        ({"num_examples": 5}, "num_examples=5 is no key of source 'tfds'"),
    ],
)
def test_spec_errors(data_dir, changes, message):
    spec = {"source": "tfds", "name": "digits", "dir": data_dir, "split": "train"}
    with pytest.raises(UserError, match=message):
        open_source(spec | changes)
