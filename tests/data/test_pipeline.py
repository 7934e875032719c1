"""Batches from in-memory sources: purity, exact evaluation, bad records, threads. No TensorFlow."""

import itertools
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vit_jax.data import boxes, element_spec, eval_batches, open_source, train_batches
from vit_jax.data.pipeline import num_eval_batches
from vit_jax.errors import UserError

NUM_EXAMPLES = 37
BATCH_SIZE = 8


class Numbered:
    """Records whose image and label hold their own number; some of them unreadable."""

    num_classes = 50
    class_names = None
    fingerprint = "numbered"

    def __init__(self, num_examples=NUM_EXAMPLES, bad=()):
        self._num_examples = num_examples
        self._bad = set(bad)

    def __len__(self):
        return self._num_examples

    def fetch(self, indices):
        if broken := self._bad & set(indices.tolist()):
            raise OSError(f"cannot read {broken}")
        images = np.broadcast_to(indices[:, None, None, None] + 1, (len(indices), 2, 2, 1))
        return {"image": images.astype(np.uint8), "label": indices.astype(np.int32)}

    def describe(self, index):
        return f"number {index}"


def take(batches, count):
    with batches:
        return list(itertools.islice(batches, count))


def train(source, rows=None, **options):
    rows = np.arange(BATCH_SIZE) if rows is None else rows
    return train_batches(source, batch_size=BATCH_SIZE, rows=rows, seed=3, **options)


def evaluate(source):
    return eval_batches(source, batch_size=BATCH_SIZE, rows=np.arange(BATCH_SIZE))


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_global_batch_does_not_depend_on_processes(num_processes):
    whole = take(train(Numbered()), 12)
    parts = [
        take(train(Numbered(), rows), 12) for rows in np.split(np.arange(BATCH_SIZE), num_processes)
    ]
    joined = [
        {key: np.concatenate([part[key] for part in step]) for key in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)


def test_rows_come_in_the_order_asked_for():
    rows = np.array([5, 0, 7])
    (picked,) = take(train(Numbered(), rows), 1)
    (whole,) = take(train(Numbered()), 1)
    np.testing.assert_array_equal(picked["label"], whole["label"][rows])


@pytest.mark.parametrize("start_step", [1, 4, 5, 11])
def test_restart_at_any_step(start_step):
    whole = take(train(Numbered()), 14)
    assert_same(take(train(Numbered(), start_step=start_step), 14 - start_step), whole[start_step:])


@pytest.mark.parametrize(("num_threads", "prefetch"), [(1, 0), (1, 1), (4, 3), (3, 9)])
def test_threads_and_prefetching_change_nothing(num_threads, prefetch):
    expected = take(train(Numbered()), 10)
    options = {"num_threads": num_threads, "prefetch": prefetch}
    assert_same(take(train(Numbered(), **options), 10), expected)


def test_an_epoch_holds_every_example_once():
    labels = np.concatenate([batch["label"] for batch in take(train(Numbered()), NUM_EXAMPLES)])
    epochs = labels.reshape(BATCH_SIZE, NUM_EXAMPLES)
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(NUM_EXAMPLES))
    assert not np.array_equal(epochs[0], epochs[1])


def test_repeats_put_copies_into_the_same_batch():
    for batch in take(train(Numbered(), repeats=2), 5):
        np.testing.assert_array_equal(batch["label"][:4], batch["label"][4:])
        assert len(set(batch["label"])) == 4
    for batch in take(train(Numbered(), repeats=3), 5):
        np.testing.assert_array_equal(batch["label"][:3], batch["label"][3:6])
        np.testing.assert_array_equal(batch["label"][:2], batch["label"][6:])
        assert len(set(batch["label"])) == 3
    with pytest.raises(UserError, match="write 1 to the batch size, 8"):
        train(Numbered(), repeats=9)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 50),
    st.integers(1, 12).flatmap(
        lambda size: st.tuples(st.just(size), st.permutations(range(size)), st.integers(1, size))
    ),
)
def test_evaluation_is_exact(num_examples, batch):
    batch_size, rows, num_processes = batch
    source = Numbered(num_examples)
    seen, counts = [], set()
    for part in np.array_split(np.array(rows), num_processes):
        batches = take(eval_batches(source, batch_size=batch_size, rows=part, prefetch=0), None)
        counts.add(len(batches))
        for one in batches:
            real = one["mask"] == 1
            seen += one["label"][real].tolist()
            assert one["mask"].dtype == np.float32
            assert not one["image"][~real].any()
            assert not one["label"][~real].any()
            np.testing.assert_array_equal(one["image"][real, 0, 0, 0], one["label"][real] + 1)
    assert sorted(seen) == list(range(num_examples))
    assert counts == {num_eval_batches(source, batch_size)}


def test_bad_record_fails_with_its_name():
    with train(Numbered(bad=[11])) as batches, pytest.raises(UserError, match=r"number 11.*skip"):
        take(batches, 10)


def test_bad_record_is_replaced_in_place_purely():
    good = take(train(Numbered()), 10)
    skipping = train(Numbered(bad=[11, 12]), on_bad_image="skip")
    whole = take(skipping, 10)
    replaced = 0
    for with_bad, without in zip(whole, good, strict=True):
        was_bad = np.isin(without["label"], [11, 12])
        replaced += was_bad.sum()
        assert not np.isin(with_bad["label"], [11, 12]).any()
        np.testing.assert_array_equal(with_bad["label"][~was_bad], without["label"][~was_bad])
    assert replaced >= 4
    assert skipping.num_bad_images >= replaced
    assert any("number 11" in line for line in skipping.bad_images)
    # The same on two processes, and from the middle.
    half = take(train(Numbered(bad=[11, 12]), np.arange(4, 8), on_bad_image="skip"), 10)
    np.testing.assert_array_equal(half[3]["label"], whole[3]["label"][4:])
    late = take(train(Numbered(bad=[11, 12]), start_step=6, on_bad_image="skip"), 4)
    assert_same(late, whole[6:])


def test_bad_record_in_evaluation_is_always_an_error():
    batches = eval_batches(Numbered(bad=[20]), batch_size=8, rows=np.arange(8))
    with batches, pytest.raises(UserError, match="number 20"):
        take(batches, None)


def test_a_source_that_reads_nothing_is_an_error_even_when_skipping():
    batches = train(Numbered(bad=range(NUM_EXAMPLES)), on_bad_image="skip")
    with batches, pytest.raises(UserError, match="in a row cannot be used"):
        take(batches, 1)


def test_unknown_choice_for_bad_images():
    with pytest.raises(UserError, match="did you mean 'skip'"):
        train(Numbered(), on_bad_image="skipp")


def data_threads():
    return [thread for thread in threading.enumerate() if thread.name == "vit-data"]


def test_closing_stops_the_threads():
    before = data_threads()
    batches = train(Numbered(), num_threads=3, prefetch=4)
    next(batches)
    assert len(data_threads()) == len(before) + 3
    batches.close()
    batches.close()
    assert data_threads() == before
    with pytest.raises(StopIteration):
        next(batches)


@pytest.mark.parametrize("label", [-1, 50])
@pytest.mark.parametrize("batches", [train, evaluate])
def test_a_label_that_is_no_class_is_refused(batches, label):
    """A model would learn such an image as one of no class, and be wrong at it whatever it says."""

    class Odd(Numbered):
        def fetch(self, indices):
            records = super().fetch(indices)
            return {**records, "label": np.where(indices == 5, label, records["label"])}

    message = f"numbered: label {label} of an image is none of its 50 classes; write labels from 0"
    with pytest.raises(UserError, match=message):
        take(batches(Odd()), None)


def test_a_label_of_an_object_that_is_no_class_is_refused():
    class Boxed(Numbered):
        def fetch(self, indices):
            records = super().fetch(indices)
            found = np.where(indices[:, None] == 5, self.label, [0, -1]).astype(np.int32)
            return {"image": records["image"], "box_label": found, **self.more(records)}

    Boxed.more, Boxed.label = lambda self, records: {}, 49
    take(evaluate(Boxed()), None)
    Boxed.label = 50
    with pytest.raises(UserError, match="label 50 of an object is none of its 50 classes"):
        take(evaluate(Boxed()), None)
    Boxed.more = lambda self, records: {"label": records["label"]}  # The classes are theirs.
    take(evaluate(Boxed()), None)
    objects = boxes.Objects(np.float32([[0, 0, 1, 1]] * 2), [0, -1], [False] * 2, [0] * 2)
    with pytest.raises(UserError, match="here: object 1 has the label -1; write 0 or more"):
        boxes.check(objects, on_bad_box="fail", describe=lambda: "here")


def test_numbers_and_labels_of_several_classes_are_not_taken_for_classes():
    class Measured(Numbered):
        def fetch(self, indices):
            records = super().fetch(indices)
            return {**records, "label": -records["label"].astype(self.dtype)}

    Measured.dtype = np.float32
    assert take(train(Measured()), 5)[-1]["label"].min() < -1
    Measured.dtype, Measured.num_classes = np.int32, 0
    assert take(train(Measured()), 5)[-1]["label"].min() < -1


def test_a_dead_source_is_named():
    released = threading.Event()

    class Dead(Numbered):
        def fetch(self, indices):
            released.wait()
            return super().fetch(indices)

    batches = train(Dead(), timeout_s=0.05)
    with pytest.raises(UserError, match=r"numbered delivered nothing .* \(batch 0\)"):
        next(batches)
    released.set()
    batches.close()


def test_element_spec_of_arrays():
    spec = element_spec(Numbered())
    assert spec["image"].shape == (2, 2, 1)
    assert spec["image"].dtype == np.uint8
    assert spec["label"].shape == ()
    assert spec["label"].dtype == np.int32


def test_array_sources_do_not_import_tensorflow(tmp_path):
    path = tmp_path / "tiny.npz"
    np.savez(path, image=np.zeros((9, 4, 4, 3), np.uint8), label=np.arange(9))
    program = f"""
import sys
import numpy as np
import vit_jax.data as data
for spec in [dict(source="npz", name={str(path)!r}), dict(source="fake", image_size=8)]:
    source = data.open_source(spec)
    data.element_spec(source)
    next(data.train_batches(source, batch_size=4, rows=np.arange(4), seed=0))
    list(data.eval_batches(source, batch_size=4, rows=np.arange(4)))
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_interrupt_while_waiting_ends_the_process():
    program = """
import os, signal, threading
import numpy as np
from vit_jax.data import open_source, train_batches
# Where the tests run in the background of a shell, children inherit that Ctrl-C is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
source = open_source(dict(source="fake", image_size=8))
stuck = threading.Event()
def never(indices):
    os.kill(os.getpid(), signal.SIGINT)
    stuck.wait()
source.fetch = never
batches = train_batches(source, batch_size=4, rows=np.arange(4), seed=0, prefetch=1)
try:
    next(batches)
except KeyboardInterrupt:
    batches.close()
    print("interrupted")
"""
    result = subprocess.run(
        [sys.executable, "-c", program], check=True, timeout=120, capture_output=True, text=True
    )
    assert result.stdout == "interrupted\n"


def test_fake_source_is_deterministic_and_varied():
    spec = {"source": "fake", "num_examples": 50, "num_classes": 4, "image_size": 6}
    one, other = open_source(spec), open_source(spec)
    indices = np.arange(50)
    assert_same([one.fetch(indices)], [other.fetch(indices)])
    assert len(np.unique(one.fetch(indices)["image"].reshape(50, -1), axis=0)) == 50
    assert set(one.fetch(indices)["label"]) == {0, 1, 2, 3}
    assert not np.array_equal(
        open_source(spec | {"split": "test"}).fetch(indices)["image"], one.fetch(indices)["image"]
    )
