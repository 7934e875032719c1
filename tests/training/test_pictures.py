"""Pictures that fail, and names that programs take for markup, cost no run its end."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from vit_jax import attention
from vit_jax.parallel import sharding
from vit_jax.report import html
from vit_jax.report.sections import read_sections
from vit_jax.tasks import classification
from vit_jax.training import pictures
from vit_jax.training.loop import train


def fail(*_, **__):
    raise ValueError("cannot draw\nthis")


@pytest.fixture
def pictured(tiny_config, drawing_reports):
    with drawing_reports():
        yield tiny_config(log__pictures=True, total=2, eval__every=0, log__writers=["tensorboard"])


def test_whatever_fails_in_the_pictures_the_run_is_done(pictured, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(classification.Task, "sections", fail)
    monkeypatch.setattr(attention, "sections", fail)
    monkeypatch.setattr(html, "render", fail)
    train(pictured, str(tmp_path))
    assert (tmp_path / "DONE").exists()
    found = [record.getMessage() for record in caplog.records if "could not" in record.getMessage()]
    assert len(found) == 3
    assert all(line.endswith("could not be made: cannot draw this") for line in found)


def test_a_teacher_is_not_gathered_for_the_pictures():
    everywhere = sharding.replicated(sharding.data_mesh(jax.devices()[:1]))
    params = jax.device_put({"backbone": np.ones(2), "teacher": np.ones(3)}, everywhere)
    task = SimpleNamespace(inference_params=lambda params: {"backbone": params["backbone"]})
    found = pictures._on_host(task, params)
    assert found.keys() == {"backbone"}
    np.testing.assert_array_equal(found["backbone"], [1, 1])


def test_classes_called_like_formulas_end_a_run_like_any_other(
    pictured, tmp_path, monkeypatch, caplog
):
    names = ["$x^$", "$5_$10", "\x1b[31mred", "two\nlines", "\u202e", *map(str, range(5, 10))]
    monkeypatch.setattr(classification.Task, "_names", lambda self: tuple(names))
    train(pictured, str(tmp_path))
    assert (tmp_path / "DONE").exists()
    sections = read_sections(tmp_path)
    assert all(section.image and section.drawing for section in sections if not section.table)
    confusion = next(section for section in sections if section.title == "Confusion matrix")
    assert b">$5_$10<" in confusion.drawing
    assert not [record for record in caplog.records if "could not" in record.getMessage()]
