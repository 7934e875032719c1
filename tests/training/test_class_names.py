"""Two sides whose labels are compared must number the same classes alike."""

import json
import types

import numpy as np
import pytest

from vit_jax.errors import UserError
from vit_jax.inference import fewshot
from vit_jax.training import evaluate, initial_state
from vit_jax.training.class_names import check_labels, moved
from vit_jax.training.class_rows import rows_by_name
from vit_jax.training.learned import Learned
from vit_jax.types import ArraySpec, DataInfo


def labels(*names, count=0):
    return DataInfo({}, count or len(names), names or None)


def npz(path, *names, count=20):
    """Writes images with labels of the named classes, of which all occur."""
    images = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
    numbers = np.arange(count) % len(names)
    np.savez(path, image=images, label=numbers, class_names=np.array(names))
    return str(path)


def test_two_numbers_for_one_name_are_refused_and_other_words_warned_of(caplog):
    check_labels("a", labels("cat", "dog"), "b", labels("cat", "dog"))
    check_labels("a", labels(count=2), "b", labels("cat", "dog"))
    assert not caplog.text
    check_labels("a", labels("tench", "hen"), "b", labels("tench, Tinca tinca", "hen"))
    assert "a calls class 0 'tench', b 'tench, Tinca tinca': is it the same?" in caplog.text
    for other in (("dog", "cat"), ("dog", "eel"), ("ant", "cat")):
        with pytest.raises(UserError, match=rf"order: class 0 is '{other[0]}', in b 'cat'"):
            check_labels("a", labels(*other), "b", labels("cat", "dog"))
    with pytest.raises(UserError, match="a has 3 classes, b has 2"):
        check_labels("a", labels(count=3), "b", labels("cat", "dog"))


def test_a_name_of_several_classes_tells_nothing_where_both_sides_agree():
    assert moved(("crane", "crane", "kite"), ("crane", "crane, machine", "kite")) is None
    assert moved(("crane", "kite", "crane"), ("crane", "crane", "kite")) == (1, "kite", "crane")


def test_words_of_zero_shot_classification_are_numbered_as_the_labels(monkeypatch, caplog):
    def check(words, names, has_labels=True):
        monkeypatch.setattr(evaluate, "has_labels", lambda split: has_labels)
        split = evaluate.Split("val", labels(*names), "")
        task = types.SimpleNamespace(info=DataInfo({}, 0), classes=words, learns_classes=True)
        evaluate._check_meanings(split, task)

    unlabeled = types.SimpleNamespace(info=labels("a", "b"), learns_classes=False)
    evaluate._check_meanings(evaluate.Split("val", labels("x", "y", "z"), ""), unlabeled)
    check(("cat", "dog"), ("cat", "dog"))
    check(("dog", "cat"), ("cat", "dog"), has_labels=False)  # Nothing reads the labels.
    assert not caplog.text
    check(("a cat", "a dog"), ("cat", "dog"))
    assert "calls class 0 'cat', config.task.classes 'a cat'" in caplog.text
    with pytest.raises(UserError, match=r"class 0 is 'cat', in config\.task\.classes 'dog'"):
        check(("dog", "cat"), ("cat", "dog"))
    with pytest.raises(UserError, match=r"has 2 classes, config\.task\.classes has 3"):
        check(("cat", "dog", "eel"), ("cat", "dog"))


def test_a_set_without_what_outputs_are_compared_with_is_named():
    evaluator = object.__new__(evaluate.Evaluator)
    evaluator._task = types.SimpleNamespace(info=DataInfo({"image": None, "label": None}, 0))
    split = evaluate.Split("test", types.SimpleNamespace(), "")
    message = "config.eval.sets.test: its examples have no 'label', which evaluation compares"
    with pytest.raises(UserError, match=message), evaluator._naming_fields(split, {"image": 0}):
        raise KeyError("label")
    with pytest.raises(KeyError, match="other"), evaluator._naming_fields(split, {"image": 0}):
        raise KeyError("other")


def test_frozen_features_are_measured_on_the_same_classes(tiny_config, tmp_path):
    config = tiny_config(
        data__name=npz(tmp_path / "train.npz", "cat", "dog"),
        eval__sets__val__name=npz(tmp_path / "eval.npz", "dog", "eel"),
        init__checkpoint=str(tmp_path / "unread.npz"),
    )
    with pytest.raises(UserError, match=r"sets\.val has classes of config\.data in another order"):
        fewshot.run(config)


def test_probes_know_the_classes_that_they_are_measured_on(tiny_config, tmp_path):
    config = tiny_config(
        eval__probes__split="train",
        eval__probes__name=npz(tmp_path / "known.npz", "cat", "dog"),
        eval__sets__val__name=npz(tmp_path / "eval.npz", "ant", "cat"),
    )
    split = evaluate.open_split(config, "val")
    evaluator = types.SimpleNamespace(
        abstract={"backbone": {}}, splits=[split], _probes=config.eval.probes.to_dict()
    )
    with pytest.raises(
        UserError, match=r"sets\.val has classes of config\.eval\.probes in another"
    ):
        evaluate.Evaluator._open_probes(evaluator, config)


@pytest.fixture
def folder(tmp_path):
    """A folder of transformers with the classes dog and cat, without weights."""
    names = {"model_type": "vit", "id2label": {"0": "dog", "1": "cat"}}
    (tmp_path / "config.json").write_text(json.dumps(names))
    return str(tmp_path)


def test_a_folder_of_another_library_tells_what_was_learned(folder, caplog):
    learned = Learned.of(folder)
    assert learned.change(("cat", "dog")) == "class 0 was 'dog' and is now 'cat'"
    assert not learned.change(("dog", "cat"))
    assert not learned.change(("a", "b", "c"))
    assert not caplog.text
    assert not learned.change(("n02084071", "n02121620"))
    assert f"{folder} calls class 0 'dog', config.data 'n02084071'" in caplog.text
    assert not Learned.of("").change(("cat", "dog"))


def run_with(info=("cat", "dog"), **config):
    task = types.SimpleNamespace(info=labels(*info), learns_classes=True)
    return types.SimpleNamespace(task=task, config=types.SimpleNamespace(**config))


def test_rows_of_a_head_follow_the_names_of_another_library(folder, monkeypatch):
    """A loaded head has the rows of the file; `by_name` is tried with those of runs."""
    monkeypatch.setattr(initial_state, "_load_with_head", lambda run, head: ({"head": head}, None))
    monkeypatch.setattr(initial_state, "by_name", lambda task, names, *_, keep: (names, keep))
    init = types.SimpleNamespace(checkpoint=folder, head="auto")
    assert initial_state._load(run_with(init=init)) == (("dog", "cat"), False)
    init.head = "zero"
    assert initial_state._load(run_with(init=init)) == ({"head": "zero"}, None)
    init.head = "keep"
    assert initial_state._load(run_with(("dog", "cat"), init=init)) == ({"head": "keep"}, None)


def test_a_teacher_or_an_evaluated_checkpoint_has_the_order_of_the_data(folder, monkeypatch):
    distilled = run_with(task={"distill": {"checkpoint": folder}})
    with pytest.raises(UserError, match="the teacher was trained for other classes: class 0 was"):
        initial_state._check_teacher(distilled)
    distilled.task.learns_classes = False
    initial_state._check_teacher(distilled)
    monkeypatch.setattr(evaluate.Run, "build", lambda config: run_with())
    with pytest.raises(UserError, match="other classes: class 0 was 'dog' and is now 'cat'"):
        evaluate.evaluate_checkpoint(None, folder)


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [((), np.int32, True), ((), np.float32, False), ((3,), np.int32, False)],
)
def test_a_number_that_is_no_class_is_no_label(monkeypatch, shape, dtype, expected):
    spec = {"label": ArraySpec(shape, np.dtype(dtype))}
    monkeypatch.setattr(evaluate.data, "element_spec", lambda source, pp: spec)
    assert evaluate.has_labels(evaluate.Split("val", None, "")) == expected


def test_classes_of_one_name_keep_the_order_of_their_rows():
    before, after = ["crane", "kite", "crane"], ["kite", "crane", "crane", "crane"]
    assert rows_by_name(before, after) == [1, 0, 2, None]
