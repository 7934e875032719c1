"""Data that has changed since a run was trained: classes by other names, more or fewer images."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from vit_jax import config as config_lib
from vit_jax import tasks
from vit_jax.errors import UserError
from vit_jax.training import class_rows, initial_state
from vit_jax.training.class_names import difference
from vit_jax.training.evaluate import evaluate_checkpoint, evaluate_workdir
from vit_jax.training.loop import train
from vit_jax.training.run import Run
from vit_jax.training.workdir import Workdir
from vit_jax.types import ArraySpec, DataInfo

pytestmark = pytest.mark.usefixtures("one_device")

TINY = Path(__file__).parents[1] / "tiny.py"
NAMES = tuple("abcdefghij")
SWAPPED = ("b", "a", *NAMES[2:])


def config_of(npz, **keys):
    small = {"model.depth": "0", "model.position": "none", "model.pooling": "mean"}
    config = config_lib.load(f"{TINY}:{npz}", {"total": "2", "ema_decay": "0", **small})
    config.unlock()
    for key, value in keys.items():
        config_lib.set_key(config, key.replace("__", "."), value)
    return config_lib.validate(config)


def write_data(path, digits_npz, names, num_examples=300):
    with np.load(digits_npz) as arrays:
        images, labels = arrays["image"][:num_examples], arrays["label"][:num_examples]
    np.savez(path, image=images, label=labels, class_names=np.array(names))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits_npz, running_on_one_device):
    """A folder with `data.npz` and the run that was trained on it."""
    folder = tmp_path_factory.mktemp("trained")
    npz = write_data(folder / "data.npz", digits_npz, NAMES)
    with running_on_one_device():
        train(config_of(npz), str(folder / "run"))
    return folder


@pytest.fixture
def changed(trained, tmp_path, digits_npz):
    """`changed(names, ...)` → (config, workdir) of the run when its file of data has changed."""
    folder = shutil.copytree(trained, tmp_path / "copy")

    def change(names, num_examples=300, **keys):
        write_data(trained / "data.npz", digits_npz, names, num_examples)
        return config_of(trained / "data.npz", **keys), str(folder / "run")

    yield change
    write_data(trained / "data.npz", digits_npz, NAMES)


def test_a_run_is_not_resumed_with_classes_in_another_order(changed):
    config, workdir = changed(SWAPPED, total=4)
    with pytest.raises(UserError, match="other classes: class 0 was 'a' and is now 'b'"):
        train(config, workdir)


def test_a_run_is_not_evaluated_on_classes_in_another_order(changed):
    config, workdir = changed(SWAPPED)
    for evaluate in (
        lambda: evaluate_workdir(Workdir.existing(workdir), {}),
        lambda: evaluate_checkpoint(config, workdir),
    ):
        with pytest.raises(UserError, match="other classes: class 0 was 'a' and is now 'b'"):
            evaluate()


def test_another_number_of_examples_is_a_warning(changed, capsys):
    config, workdir = changed(NAMES, num_examples=280, total=4)
    train(config, workdir)
    assert "warning: changed since the checkpoint: training examples: 270 → 252" in (
        capsys.readouterr().err
    )


def test_an_average_that_the_run_did_not_keep_is_not_evaluated(trained):
    with pytest.raises(UserError, match=r"has no ema\..* give the config it was trained with"):
        evaluate_workdir(Workdir.existing(str(trained / "run")), {"ema_decay": "0.9"})


def head_of(trained, digits_npz, tmp_path, names, **keys):
    """The kernel of the head with which a run that starts from `trained` begins, and the report."""
    npz = write_data(tmp_path / "other.npz", digits_npz, names)
    run = Run.build(config_of(npz, init__checkpoint=str(trained / "run"), **keys))
    state, report = initial_state.first_state(run)
    return np.asarray(state.params["head"]["kernel"]), str(report)


def test_rows_of_the_head_follow_the_names_of_the_classes(trained, digits_npz, tmp_path):
    def head(names, **keys):
        return head_of(trained, digits_npz, tmp_path, names, **keys)

    before, report = head(NAMES)
    assert np.all(np.any(before, axis=0))  # No class has a row of zeros.
    assert "rows of the head" not in report
    for keys in ({}, {"init__head": "keep"}):
        swapped, report = head(SWAPPED, **keys)
        np.testing.assert_array_equal(swapped, before[:, [1, 0, *range(2, 10)]])
        assert "10 of 10 rows of the head kept" in report
    some, report = head(("new", "a", *"cdefghij"))
    np.testing.assert_array_equal(some[:, 1:], before[:, [0, *range(2, 10)]])
    assert not np.any(some[:, 0])
    assert "9 of 10 rows of the head kept, by their classes' names; new: new" in report
    none, report = head(tuple("klmnopqrst"))
    assert not np.any(none)
    assert "0 of 10 rows of the head kept, by their classes' names; new: k, l, m, ..." in report
    with pytest.raises(UserError, match="cannot be kept: the checkpoint has no class 'new'"):
        head(("new", *NAMES[1:]), init__head="keep")


@pytest.mark.parametrize(
    ("task", "arrays"),
    [
        ({"name": "classification"}, {"label": ArraySpec((), np.dtype(np.int32))}),
        (
            {"name": "segmentation", "num_classes": 5},
            {"segmentation": ArraySpec((16, 16, 1), np.dtype(np.uint8))},
        ),
        (
            {"name": "segmentation", "num_classes": 5, "head": "mask"},
            {"segmentation": ArraySpec((16, 16, 1), np.dtype(np.uint8))},
        ),
        (
            {"name": "detection", "loss": "softmax"},
            {
                "boxes": ArraySpec((2, 4), np.dtype(np.float32)),
                "box_label": ArraySpec((2,), np.dtype(np.int32)),
            },
        ),
    ],
)
def test_the_rows_of_every_tasks_head_are_found(task, arrays):
    model = {"name": "vit", "patch_size": 4, "width": 16, "depth": 1, "num_heads": 2}
    spec = {"image": ArraySpec((16, 16, 3), np.dtype(np.uint8)), **arrays}
    built = tasks.build(task, model, DataInfo(spec, 5, tuple("abcde")))
    axes = class_rows._class_axes(built)
    assert axes
    assert not any(path[0] == "backbone" for path in axes)
    shapes = class_rows._shapes(built)
    rows = {shapes[path][axis] for path, axis in axes.items()}
    assert rows == {6 if task.get("loss") == "softmax" else 5}


def test_names_are_compared_in_one_form_of_unicode():
    assert difference(("e\u0301t\u00e9", "b"), ("\u00e9te\u0301", "b")) == ""
    assert difference(("a",), ("a", "b")) == "there were 1 classes and are now 2"
