"""The digits in TFDS's older format: the same records, damage, and conversion."""

import dataclasses

import numpy as np
import pytest
from stored_digits import open_digits

from vit_jax.data import element_spec, open_source, train_batches
from vit_jax.errors import UserError


@pytest.fixture(scope="module")
def tfrecord_dir(tmp_path_factory):
    """The digits in TFDS's older format, as most people's ImageNet is."""
    from vit_jax.data.prepare import find_builder

    folder = str(tmp_path_factory.mktemp("tfrecord"))
    builder = find_builder("digits", folder, file_format="tfrecord")
    builder.download_and_prepare(file_format="tfrecord")
    return folder


@pytest.mark.parametrize("split", ["train", "test[:100]", "train[700:]+test[5:20]"])
def test_tfrecord_holds_the_same_records(data_dir, tfrecord_dir, split):
    expected, ours = open_digits(data_dir, split), open_digits(tfrecord_dir, split)
    assert len(ours) == len(expected)
    indices = np.random.default_rng(0).permutation(len(ours))
    ours, expected = ours.fetch(indices), expected.fetch(indices)
    for key in expected:
        np.testing.assert_array_equal(ours[key], expected[key])


def test_damaged_tfrecord_file_is_named(tfrecord_dir, tmp_path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(tfrecord_dir, folder)
    (path,) = folder.rglob("digits-test.tfrecord*")
    whole = path.read_bytes()
    for rest, message in [(whole[:-100], "359 of 360"), (whole[:5], "0 of 360"), (b"", "0 of 360")]:
        path.write_bytes(rest)
        source = open_digits(str(folder), "test")
        with pytest.raises(UserError, match=rf"digits-test\S+ is damaged: {message}"):
            source.fetch(np.array([0]))
    with pytest.raises(UserError, match="is damaged"):
        element_spec(source, "decode(1)")
    path.unlink()
    with pytest.raises(UserError, match=r"cannot read \S+digits-test"):
        open_digits(str(folder), "test").fetch(np.array([0]))


@pytest.mark.parametrize("damage", ["cut off", "changed"])
def test_damaged_tfrecord_is_neither_checked_nor_converted(tfrecord_dir, tmp_path, damage, capsys):
    import shutil

    from vit_jax.__main__ import main

    folder = tmp_path / "copy"
    shutil.copytree(tfrecord_dir, folder)
    check = ["prepare", "digits", f"--data_dir={folder}", "--check"]
    assert main(check) == 0
    assert "checksums agree" in capsys.readouterr().err
    (path,) = folder.rglob("digits-train.tfrecord*")
    content = bytearray(path.read_bytes())
    if damage == "changed":
        content[60] ^= 1
    path.write_bytes(content[:-100] if damage == "cut off" else content)
    convert = ["prepare", "digits", f"--tfrecord={folder}", f"--data_dir={tmp_path}/new"]
    for command in (check, convert):
        assert main(command) == 2
        assert f"{path} is damaged after " in capsys.readouterr().err


def test_tfrecord_that_ends_between_two_records_is_short(tfrecord_dir, tmp_path):
    import shutil
    import types

    from vit_jax.data import tfrecord
    from vit_jax.data.prepare import datasets

    shutil.copytree(tfrecord_dir, tmp_path, dirs_exist_ok=True)
    (path,) = tmp_path.rglob("digits-test.tfrecord*")
    data = path.read_bytes()
    shard = types.SimpleNamespace(filename=str(path), examples_in_shard=360)
    end_of_first = tfrecord.record_places(data, shard)[0, 1] + 4
    path.write_bytes(data[:end_of_first])
    with pytest.raises(UserError, match=r"digits-test\S+ has 1 of 360 records"):
        datasets.check("digits", str(tmp_path))


def test_preparing_where_a_tfrecord_build_is_says_that_it_can_be_read(tfrecord_dir, capsys):
    from vit_jax.__main__ import main

    assert main(["prepare", "digits", f"--data_dir={tfrecord_dir}"]) == 0
    shown = capsys.readouterr()
    assert "is TFRecord, which is read as it is; --tfrecord=" in shown.err
    assert shown.out.startswith(tfrecord_dir)


def test_tfrecord_known_only_from_its_files_is_converted(tfrecord_dir, data_dir, tmp_path):
    from pathlib import Path

    from vit_jax.data.prepare import convert_tfrecord, find_builder

    (source,) = Path(tfrecord_dir).glob("digits/*")
    copy = tmp_path / "old" / "mydata" / source.name
    copy.mkdir(parents=True)
    for path in source.iterdir():
        content = path.read_bytes()
        if path.name == "dataset_info.json":
            content = content.replace(b'"name": "digits"', b'"name": "mydata"')
        (copy / path.name.replace("digits-", "mydata-")).write_bytes(content)
    folder = convert_tfrecord("mydata", str(tmp_path / "old"), str(tmp_path / "new"))
    assert folder == str(tmp_path / "new" / "mydata" / source.name)
    assert find_builder("mydata", str(tmp_path / "new")).info.file_format.value == "array_record"
    spec = {"source": "tfds", "name": "mydata", "dir": str(tmp_path / "new"), "split": "test"}
    rows = np.arange(360)
    ours, expected = open_source(spec).fetch(rows), open_digits(data_dir, "test").fetch(rows)
    for key in expected:
        np.testing.assert_array_equal(ours[key], expected[key])


def test_files_fetched_whole_give_the_same_batches_on_any_processes(tfrecord_dir, monkeypatch):
    """As from an object store; the files are local, but read by the same means."""
    from vit_jax.data import tfrecord
    from vit_jax.data.prepare import datasets

    builder = datasets.find_builder("digits", tfrecord_dir)
    fetched = []
    fetch = tfrecord._RemoteFiles._fetch
    monkeypatch.setattr(
        tfrecord._RemoteFiles,
        "_fetch",
        lambda self, number, future: (fetched.append(number), fetch(self, number, future)),
    )
    # A dozen shards, as parts of the one file there is.
    (whole,) = builder.info.splits["train"].file_instructions
    shards = [dataclasses.replace(whole, skip=n * 100, take=100) for n in range(12)]
    reader = tfrecord.TfrecordReader(
        shards, builder.info.features.deserialize_example_np, remote=True
    )

    class Remote:
        num_classes, class_names, fingerprint = 2000, None, "remote"
        blocks = reader.blocks

        def __len__(self):
            return len(reader)

        def fetch(self, indices):
            examples = reader.__getitems__(indices.tolist())
            return {
                "image": np.stack([example["image"] for example in examples]),
                "label": np.array([int(example["id"]) for example in examples], np.int32),
            }

        def describe(self, index):
            return str(index)

    def take(rows, start_step=0):
        batches = train_batches(Remote(), batch_size=48, rows=rows, seed=0, start_step=start_step)
        with batches:
            return np.stack([next(batches)["label"] for _ in range(start_step, 30)])

    labels = take(np.arange(48))
    assert sorted(labels[:25].ravel()) == list(range(1200))
    halves = [take(rows) for rows in np.split(np.arange(48), 2)]
    np.testing.assert_array_equal(np.concatenate(halves, axis=1), labels)
    np.testing.assert_array_equal(take(np.arange(48), 20), labels[20:])
    assert len(fetched) == len(set(fetched))  # All twelve fit into memory: each came once.


def test_file_missing_from_the_store_is_named(tfrecord_dir):
    from vit_jax.data import tfrecord
    from vit_jax.data.prepare import datasets

    builder = datasets.find_builder("digits", tfrecord_dir)
    (whole,) = builder.info.splits["train"].file_instructions
    shard = dataclasses.replace(whole, filename=whole.filename + ".gone")
    reader = tfrecord.TfrecordReader([shard], bytes, remote=True)
    for _ in range(2):
        with pytest.raises(UserError, match=r"cannot read \S+\.gone"):
            reader.__getitems__([0])
