"""Processes of one run that have read different things say so, each of them."""

import json
import types

import jax
import numpy as np
import pytest

from vit_jax.data import open_source
from vit_jax.errors import UserError
from vit_jax.training import agreement
from vit_jax.training.evaluate import Evaluator
from vit_jax.training.run import Run


@pytest.fixture
def together(monkeypatch):
    """Returns a function that gives the error of processes with these runs, splits and steps."""

    def gather(own):
        told.append(own)
        return seen

    def check(*processes):
        nonlocal seen
        seen = []
        told.clear()
        for args in processes:
            agreement.check(*args)
        seen = [json.loads(json.dumps(own)) for own in told]
        for args in processes:
            agreement.check(*args)

    seen, told = [], []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(agreement, "_gathered", gather)
    return check


@pytest.fixture
def made(tiny_config):
    def make(**keys):
        config = tiny_config(**keys)
        spec = {key: config.data[key] for key in ("source", "name", "split")}
        source = open_source(spec)
        return Run(config, None, source, None, None, None, None, None, None)

    return make


def test_processes_that_have_read_the_same_go_on(together, made):
    one, other = made(), made(data__threads=3)
    together((one, {"eval.sets.val": one.source}, 4), (other, {"eval.sets.val": other.source}, 4))


def test_what_differs_is_named(together, made):
    run = made()
    splits = {"eval.sets.val": run.source}
    for other, message in (
        ((made(seed=3), splits, 4), r"config.seed is 0 in process 0 and 3 in process 1"),
        ((made(total=77), splits, 4), "config.total is"),
        ((run, splits, 8), "the checkpoint to start from is 4 in process 0 and 8 in process 1"),
        ((run, {}, 4), "examples of config.eval.sets.val is .* and nothing in process 1"),
    ):
        with pytest.raises(UserError, match=message):
            together((run, splits, 4), other)


def test_images_that_probes_know_are_compared(together, made, tmp_path):
    run = made()
    few = made(data__split="train[:7]").source
    known = types.SimpleNamespace(splits=[], _known=types.SimpleNamespace(source=few))
    assert Evaluator.sources(known) == {"eval.probes": few}
    with pytest.raises(UserError, match=r"examples of config.eval.probes is "):
        together((run, {"eval.probes": run.source}, 4), (run, Evaluator.sources(known), 4))


def test_other_files_with_the_same_number_of_examples_are_named(together, made, tmp_path):
    runs = []
    for names in (["1.png", "2.png"], ["1.png", "3.png"]):
        for label in "ab":
            for name in names:
                path = tmp_path / str(len(runs)) / label / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"an image")
        place = str(tmp_path / str(len(runs)))
        runs.append(made(data__source="folder", data__name=place))
    together((runs[0], {}, None), (runs[0], {}, None))
    with pytest.raises(UserError, match=r"the list of examples of config.data is .*process 1"):
        together(*((run, {}, None) for run in runs))


def test_facts_of_any_length_come_back_from_every_process(monkeypatch):
    facts = {"config.seed": "0", "names": "é" * 300}
    other = np.frombuffer(json.dumps({"config.seed": "1"}).encode(), np.uint8)

    def allgather(own):
        theirs = np.zeros_like(own)
        theirs[: len(other)] = other[: len(own)]
        return np.stack([own, np.array([len(other)]) if len(own) == 1 else theirs])

    monkeypatch.setattr(agreement.multihost_utils, "process_allgather", allgather)
    assert agreement._gathered(facts) == [facts, {"config.seed": "1"}]
