"""Preprocessed batches: as pure as plain ones; bad images are named or replaced."""

import gc
import io
import itertools
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from vit_jax.data import element_spec, eval_batches, open_source, reading, sampling, train_batches
from vit_jax.data import pp as preprocessing
from vit_jax.data.graph import PreprocessedStream
from vit_jax.errors import UserError

NUM_EXAMPLES = 23
BATCH_SIZE = 8
PP = "decode_jpeg_and_inception_crop(16)|flip_lr"  # Two ops that draw, and are quick to trace.
EVAL_PP = "decode|resize_small(20)|central_crop(16)"


def encode(pixels, kind="JPEG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def images():
    """JPEG and PNG files of varied size."""
    random = np.random.default_rng(0)
    files = []
    for number in range(NUM_EXAMPLES):
        height, width = random.integers(24, 60, 2)
        coarse = random.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        pixels = np.asarray(Image.fromarray(coarse).resize((width, height)))
        files.append(encode(pixels, "PNG" if number % 5 == 0 else "JPEG"))
    return files


class Files:
    """Encoded images in memory."""

    class_names = None
    fingerprint = "files"

    def __init__(self, files):
        self._files = np.empty(len(files), object)
        self._files[:] = files

    def __len__(self):
        return len(self._files)

    @property
    def num_classes(self):
        return len(self)

    def fetch(self, indices):
        names = np.array([f"{index}.jpg".encode() for index in indices], object)
        return {"image": self._files[indices], "label": indices.astype(np.int64), "name": names}

    def describe(self, index):
        return f"{index}.jpg"


def take(batches, count=None):
    with batches:
        return list(itertools.islice(batches, count))


def train(source, rows=None, **options):
    rows = np.arange(BATCH_SIZE) if rows is None else rows
    options = {"seed": 3, "pp": PP} | options
    return train_batches(source, batch_size=BATCH_SIZE, rows=rows, **options)


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


@pytest.fixture(scope="module")
def reference(images):
    return take(train(Files(images)), 9)


@pytest.mark.parametrize("num_processes", [pytest.param(2, marks=pytest.mark.soak), 4])
def test_global_batch_does_not_depend_on_processes(images, reference, num_processes):
    parts = [
        take(train(Files(images), rows), 9)
        for rows in np.split(np.arange(BATCH_SIZE), num_processes)
    ]
    joined = [
        {key: np.concatenate([part[key] for part in step]) for key in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert_same(joined, reference)


@pytest.mark.parametrize(
    "options",
    [
        {"start_step": 4},
        {"start_step": 4, "num_threads": 1, "prefetch": 0},
        {"start_step": 4, "num_threads": 5, "prefetch": 4},
    ],
)
def test_restart_threads_and_prefetching_change_nothing(images, reference, options):
    assert_same(take(train(Files(images), **options), 5), reference[4:])


def test_augmentation_differs_between_epochs_and_seeds(images):
    source = Files(images[:1])
    crops = [batch["image"] for batch in take(train(source), 2)]
    crops = np.concatenate(crops).reshape(2 * BATCH_SIZE, -1)
    assert len(np.unique(crops, axis=0)) == 2 * BATCH_SIZE
    (other,) = take(train(source, seed=4), 1)
    assert not np.array_equal(other["image"].reshape(BATCH_SIZE, -1), crops[:BATCH_SIZE])


def test_repeats_are_augmented_differently(images):
    for batch in take(train(Files(images), repeats=2), 3):
        one, other = np.split(batch["image"], 2)
        np.testing.assert_array_equal(*np.split(batch["label"], 2))
        assert all(not np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_element_spec_is_what_batches_hold(images):
    source = Files(images)
    for pp in (PP, EVAL_PP, "decode|resize(12)|value_range(-1,1)|onehot(23, key='label')"):
        spec = element_spec(source, pp)
        (batch,) = take(train(source, pp=pp), 1)
        assert spec.keys() == batch.keys() == {"image", "label"}
        for key, x in batch.items():
            assert spec[key].shape == x.shape[1:]
            assert spec[key].dtype == x.dtype


def test_the_published_imagenet_string_works_as_written(images):
    pp = (
        "decode_jpeg_and_inception_crop(224)|flip_lr|randaug(2,10)|value_range(-1, 1)"
        '|onehot(1000, key="label", key_result="labels")|keep("image", "labels")'
    )
    source = Files(images)
    spec = element_spec(source, pp)
    assert {key: (s.shape, s.dtype) for key, s in spec.items()} == {
        "image": ((224, 224, 3), np.float32),
        "labels": ((1000,), np.float32),
    }
    (batch,) = take(train(source, np.arange(4), pp=pp), 1)
    assert batch["image"].min() >= -1
    assert 0.5 < batch["image"].max() <= 1
    np.testing.assert_array_equal(batch["labels"].sum(1), 1)


@pytest.mark.parametrize(("batch_size", "num_processes"), [(8, 1), (8, 2), (5, 1), (40, 4)])
def test_evaluation_is_exact(images, batch_size, num_processes):
    source = Files(images)
    expected = take(eval_batches(source, batch_size=23, rows=np.arange(23), pp=EVAL_PP))[0]
    seen, counts = {}, set()
    for rows in np.split(np.arange(batch_size), num_processes):
        batches = take(eval_batches(source, batch_size=batch_size, rows=rows, pp=EVAL_PP))
        counts.add(len(batches))
        for batch in batches:
            real = batch["mask"] == 1
            seen |= dict(zip(batch["label"][real].tolist(), batch["image"][real], strict=True))
            assert not batch["image"][~real].any()
    assert counts == {-(-NUM_EXAMPLES // batch_size)}
    assert sorted(seen) == list(range(NUM_EXAMPLES))
    for label, image in seen.items():
        np.testing.assert_array_equal(image, expected["image"][label])


def broken(images):
    """A truncated JPEG, one that is text, and one of no bytes."""
    files = list(images)
    files[1] = files[1][: len(files[1]) // 2]
    files[7] = b"<html>not found</html>"
    files[11] = b""
    return Files(files)


@pytest.mark.parametrize("number", [1, 7, 11])
def test_bad_image_fails_with_its_name(images, number):
    files = list(images)
    files[number] = broken(images)._files[number]
    with train(Files(files), pp="decode|resize(8)") as batches:  # noqa: SIM117
        with pytest.raises(UserError, match=rf"bad image {number}\.jpg: \w.*skip"):
            take(batches, 4)


def test_bad_images_are_replaced_in_place_purely(images, reference):
    skipping = train(broken(images), on_bad_image="skip")
    whole = take(skipping, 9)
    for with_bad, without in zip(whole, reference, strict=True):
        bad = np.isin(without["label"], [7, 11])
        assert not np.isin(with_bad["label"], [7, 11]).any()
        same = ~bad & (without["label"] != 1)  # A crop may miss the part that 1 lacks.
        np.testing.assert_array_equal(with_bad["label"][same], without["label"][same])
        np.testing.assert_array_equal(with_bad["image"][same], without["image"][same])
    assert skipping.num_bad_images >= 6
    assert any(line.startswith("7.jpg: ") for line in skipping.bad_images)
    half = take(train(broken(images), np.arange(4, 8), on_bad_image="skip"), 9)
    for part, batch in zip(half, whole, strict=True):
        np.testing.assert_array_equal(part["image"], batch["image"][4:])
    assert_same(take(train(broken(images), start_step=5, on_bad_image="skip"), 4), whole[5:])


def is_whole(file):
    try:
        Image.open(io.BytesIO(file)).load()
    except OSError:
        return False
    return True


def expected_labels(source, steps):
    """Works out the examples that replace bad images, one image at a time."""
    from vit_jax.data.host_tensorflow import tf

    example, seed, count = preprocessing.build(PP), 3, len(source)

    def is_bad(index, key):
        file = source.fetch(np.array([index]))["image"][0]
        if not file or is_whole(file):  # Clear without TensorFlow, which takes long for one image.
            return not file
        record = {name: tf.constant(x[0]) for name, x in source.fetch(np.array([index])).items()}
        try:
            example(record, tf.constant(key))
        except UserError:  # What a bad image is outside of a graph.
            return True
        return False

    positions = np.concatenate([sampling.train_positions(step, BATCH_SIZE) for step in steps])
    labels, _ = sampling.example_at(positions, count, seed)
    for row, key in enumerate(sampling.augment_seeds(seed, positions)):
        attempt = 0
        while is_bad(labels[row], key):
            attempt += 1
            labels[row] = sampling.replacement(int(positions[row]), attempt, count, seed)
    return labels


@pytest.mark.parametrize("start", [0, 4])
def test_bad_images_do_not_start_the_graph_again(images, monkeypatch, start):
    starts = []
    begin = PreprocessedStream._start
    monkeypatch.setattr(
        PreprocessedStream, "_start", lambda *args: starts.append(1) or begin(*args)
    )
    source = broken(images)
    batches = take(train(source, start_step=start, on_bad_image="skip"), 12 - start)
    assert len(starts) == 1
    labels = np.concatenate([batch["label"] for batch in batches])
    np.testing.assert_array_equal(labels, expected_labels(source, range(start, 12)))


def test_bad_images_that_are_forgotten_are_replaced_alike(images, monkeypatch):
    monkeypatch.setattr(reading, "_MAX_POSITIONS", 1)
    source = Files([b"" if number % 3 else file for number, file in enumerate(images)])
    batches = take(train(source, on_bad_image="skip"), 12)
    labels = np.concatenate([batch["label"] for batch in batches])
    np.testing.assert_array_equal(labels, expected_labels(source, range(12)))


def test_a_source_of_mostly_bad_images_is_as_pure(images, monkeypatch):
    monkeypatch.setattr(PreprocessedStream, "_max_in_flight", lambda _: 4)  # The graph ends early.
    source = Files([b"" if number % 5 > 1 else file for number, file in enumerate(images * 2)])
    options = {"on_bad_image": "skip", "num_threads": 2, "prefetch": 1}
    whole = take(train(source, **options), 12)  # Two epochs.
    labels = np.concatenate([batch["label"] for batch in whole])
    np.testing.assert_array_equal(labels, expected_labels(source, range(12)))
    assert_same(take(train(source, start_step=9, **options), 3), whole[9:])


def test_a_replacement_of_another_size_is_said_to_form_no_batch(images):
    files = [encode(np.zeros((20, 20, 3), np.uint8))] * 40
    files[0] = b""
    odd = [encode(np.zeros((30, 20, 3), np.uint8)) if file else file for file in files]
    first = int(np.argmax(sampling.example_at(np.arange(40), 40, 3)[0] == 0))
    instead = sampling.replacement(first, 1, 40, 3)
    files[instead] = odd[instead]
    rows, step = np.array([first % BATCH_SIZE, (first + 1) % BATCH_SIZE]), first // BATCH_SIZE
    batches = train(Files(files), rows, pp="decode", start_step=step, on_bad_image="skip")
    with batches, pytest.raises(UserError, match="do not form a batch; end it with a resize"):
        take(batches, 1)


def test_bad_image_in_evaluation_is_an_error(images):
    batches = eval_batches(broken(images), batch_size=8, rows=np.arange(8), pp=EVAL_PP)
    with batches, pytest.raises(UserError, match=r"1\.jpg"):
        take(batches)


def test_preprocessing_that_fits_no_image_is_said_to_be_at_fault(images):
    batches = train(Files(images), pp="decode|central_crop(500)", on_bad_image="skip")
    with batches, pytest.raises(UserError, match="images in a row cannot be used, the last is"):
        take(batches, 1)
    with pytest.raises(UserError, match="fails on every image"):
        element_spec(Files(images), "decode|central_crop(500)")


def test_images_of_different_sizes_need_a_resize(images):
    with train(Files(images), pp="decode", on_bad_image="skip") as batches:  # noqa: SIM117
        with pytest.raises(UserError, match="do not form a batch; end it with a resize"):
            take(batches, 1)


def test_a_first_record_that_is_bad_does_not_matter(images):
    files = [b"", *images]
    assert element_spec(Files(files), EVAL_PP)["image"].shape == (16, 16, 3)
    assert len(take(train(Files(files), on_bad_image="skip"), 5)) == 5


def test_closing_stops_the_threads(images):
    def data_threads():
        return {thread for thread in threading.enumerate() if thread.name == "vit-data"}

    before = data_threads()
    batches = train(Files(images), num_threads=3, prefetch=3)
    next(batches)
    assert data_threads() > before
    batches.close()
    assert data_threads() == before
    with pytest.raises(StopIteration):
        next(batches)
    dropped = train(Files(images))
    next(dropped)
    del dropped
    gc.collect()
    assert data_threads() == before


def test_a_dead_source_is_named(images):
    released = threading.Event()

    class Dying(Files):
        def fetch(self, indices):
            if len(indices) > 1:
                released.wait()
            return super().fetch(indices)

    batches = train(Dying(images), timeout_s=0.05)
    with pytest.raises(UserError, match="files delivered nothing for"):
        next(batches)
    released.set()
    batches.close()


def test_an_error_of_the_source_comes_after_the_batches_before_it(images):
    class Failing(Files):
        def fetch(self, indices):
            if 20 in indices:
                raise UserError("the disk is gone")
            return super().fetch(indices)

    source = Failing(images)
    batches = eval_batches(source, batch_size=8, rows=np.arange(8), pp=EVAL_PP, prefetch=3)
    with batches:
        assert [next(batches)["label"][0] for _ in range(2)] == [0, 8]
        with pytest.raises(UserError, match="the disk is gone"):
            next(batches)


def test_tensorflow_sees_no_accelerator():
    from vit_jax.data.host_tensorflow import tf

    assert {device.device_type for device in tf.config.get_visible_devices()} == {"CPU"}


def test_fake_photographs_are_of_imagenets_size():
    spec = {"source": "fake", "num_examples": 200, "encoded": True}
    source, again = open_source(spec), open_source(spec)
    files = source.fetch(np.arange(200))["image"]
    assert files.tolist() == again.fetch(np.arange(200))["image"].tolist()
    assert 90_000 < np.mean([len(file) for file in files]) < 130_000
    assert {Image.open(io.BytesIO(file)).size for file in files} >= {(500, 375), (375, 500)}
    assert element_spec(source, PP)["image"].shape == (16, 16, 3)


CLOSED_EARLY = """
import itertools, threading, time
import numpy as np
from vit_jax.data import open_source, pipeline
from vit_jax.data.ops import _kernels

calls, ahead = itertools.count(1), threading.Event()

def of_a_batch(images, draws, operations):
    # The first batches are there at once, and wanted; those that are made ahead take their time.
    if next(calls) >= 4:
        ahead.set()
        time.sleep(2)  # Without Python's lock, like the loops themselves.
    return images

_kernels.augment = of_a_batch
keys = {"source": "fake", "name": "fake", "dir": "", "split": "train", "image_size": 8}
source = open_source({**keys, "num_examples": 64})
batches = pipeline.train_batches(
    source, batch_size=8, rows=np.arange(8), seed=0, pp="randaug(2, 10)", num_threads=2
)
next(batches)
assert ahead.wait(60)
kept = batches._stream._run.outputs  # As if the garbage collector had not been there.
batches.close()
print("closed")
"""


@pytest.mark.soak
def test_python_ends_though_a_loop_was_running_when_batches_were_closed():
    command = [sys.executable, "-c", CLOSED_EARLY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.stdout == "closed\n", done.stderr
