"""A run's directory: opened by many processes at a time, and what it tells of the data."""

import resource
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from vit_jax.checkpoints import hub
from vit_jax.config import default_config
from vit_jax.errors import UserError
from vit_jax.training.workdir import Workdir
from vit_jax.types import ArraySpec, DataInfo


def test_many_open_one_workdir_at_the_same_time(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        opened = list(pool.map(lambda _: Workdir.open(str(tmp_path / "run")), range(400)))
    assert {workdir.path for workdir in opened} == {tmp_path / "run"}
    assert list((tmp_path / "run").iterdir()) == []


def test_a_disk_without_room_is_named_before_anything_is_built(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with pytest.raises(UserError, match=r"^workdir=.*: cannot write there \(File too large\)"):
            Workdir.open(str(tmp_path / "run"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_run_without_its_config_continues_and_says_so(tmp_path):
    workdir = Workdir.open(str(tmp_path))
    (line,) = workdir.check_resume(default_config())
    assert "config.json is gone, so that neither keys nor classes are compared" in line
    workdir.check_classes(["crane"])
    assert workdir.changed_examples(3) == []


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"config": 3, "version": 1}'])
def test_a_damaged_config_of_a_run_leads_to_what_helps(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json.* Restore the file\. If you delete"):
        Workdir.open(str(tmp_path)).check_resume(default_config())
    (tmp_path / "config.json").write_text('{"config": {}, "version": 99}')
    with pytest.raises(UserError, match=r"update the package$"):
        Workdir.open(str(tmp_path)).check_resume(default_config())


def test_what_the_data_told_is_told_without_them(tmp_path):
    spec = {
        "image": ArraySpec((8, 8, 3), np.dtype(np.uint8)),
        "tokens": ArraySpec((6,), np.dtype(np.int32), "words.txt"),
    }
    for info in (DataInfo(spec, 2, ("cat", "dog")), DataInfo(spec, 0)):
        workdir = Workdir.open(str(tmp_path / f"run{info.num_classes}"))
        workdir.write_config(default_config(), info, "accuracy", {})
        assert workdir.read_info() == info


def test_the_devices_of_a_run_are_recorded(tmp_path):
    workdir, mesh = Workdir.open(str(tmp_path)), np.array(jax.devices()[:2]).reshape(2, 1)
    workdir.write_config(default_config(), DataInfo({}, 0), "accuracy", {}, devices=mesh)
    assert workdir.read_record()["devices"] == {"kind": jax.devices()[0].device_kind, "count": 2}


def test_other_numbers_of_examples_are_told(tmp_path):
    workdir = Workdir.open(str(tmp_path))
    info = DataInfo({}, 3, ("cat", "dog", "cow"), (5, 1_000, 2))
    workdir.write_config(default_config(), info, "accuracy", {}, num_examples=1_007)
    assert workdir.changed_examples(1_007, (5, 1_000, 2)) == []
    assert workdir.changed_examples(1_007) == []
    (moved,) = workdir.changed_examples(1_007, (6, 999, 2))
    assert moved.startswith("class 'cat': 5 → 6, class 'dog': 1,000 → 999, so that batches")
    (fewer,) = workdir.changed_examples(1_006, (4, 1_000, 2))
    assert fewer.startswith("training examples: 1,007 → 1,006, class 'cat': 5 → 4, so that")
    info = info._replace(class_names=None, class_counts=(1,) * 9)
    workdir.write_config(default_config(), info, "accuracy", {})
    (many,) = workdir.changed_examples(18, (2,) * 9)
    assert "class 4: 1 → 2 and 4 others, so that" in many
    (tmp_path / "config.json").write_text('{"data_info": {"class_names": null}}')
    assert workdir.changed_examples(9, (1,) * 9) == []  # Earlier versions recorded no numbers.


def test_the_commits_that_a_run_started_from_stay_known(tmp_path, monkeypatch):
    config, info = default_config(), DataInfo({}, 0)
    config.init.checkpoint = address = "hf://facebook/dinov2-small"
    workdir = Workdir.open(str(tmp_path))
    for commit in ("a" * 40, "b" * 40):
        monkeypatch.setattr(hub, "_commits", {address: commit, "hf://not/named": commit})
        changed = workdir.changed_commits(config)
        workdir.write_config(config, info, "accuracy", {})
        assert workdir.read_record()["hub_commits"] == {address: "a" * 40}
    assert changed == [f"{address}: commit {'a' * 40} → {'b' * 40}"]
