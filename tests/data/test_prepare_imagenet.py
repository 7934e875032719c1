"""ImageNet from its archives, and what may then be done to a prepared dataset."""

import contextlib
import hashlib
import io
import json
import os
import types
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from PIL import Image
from tar_files import tar_of

from vit_jax.__main__ import main
from vit_jax.data import eval_batches, open_source
from vit_jax.data.prepare import datasets, imagenet_tars, shards
from vit_jax.errors import UserError

SYNSETS = ("n01440764", "n01443537", "n01739381", "n02105855")
IN_CMYK, IN_PNG = "n01739381_1309.JPEG", "n02105855_2933.JPEG"


def encoded(random, kind="JPEG", mode="RGB"):
    height, width = random.integers(8, 24, 2)
    channels = {"RGB": 3, "CMYK": 4}[mode]
    pixels = random.integers(0, 256, (height, width, channels), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels, mode).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module", autouse=True)
def small():
    """ImageNet of four classes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imagenet_tars, "COUNTS", {"train": 14, "validation": 5})
        patch.setattr(imagenet_tars, "SYNSETS", 4)
        yield


@pytest.fixture(scope="module")
def manual_dir(tmp_path_factory):
    """Both archives, of four classes, with the real set's CMYK and PNG images under their names."""
    random = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("manual")
    inner = {}
    for synset in SYNSETS:
        names = [f"{synset}_{number}.JPEG" for number in (18, 7, 100)]
        inner[synset] = {name: encoded(random) for name in names}
    inner[SYNSETS[2]][IN_CMYK] = encoded(random, mode="CMYK")
    inner[SYNSETS[3]][IN_PNG] = encoded(random, kind="PNG")
    train = tar_of([(f"{synset}.tar", tar_of(files.items())) for synset, files in inner.items()])
    (folder / imagenet_tars.ARCHIVES["train"]).write_bytes(train)
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in (3, 1, 5, 2, 4)]
    validation = tar_of([(name, encoded(random)) for name in names])
    (folder / imagenet_tars.ARCHIVES["validation"]).write_bytes(validation)
    return folder


@pytest.fixture(scope="module")
def prepared(manual_dir, tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("prepared")
    command = ["prepare", "imagenet2012", f"--data_dir={data_dir}", f"--manual_dir={manual_dir}"]
    assert main(command) == 0
    return data_dir


@pytest.fixture(scope="module")
def by_tfds(manual_dir, tmp_path_factory):
    """The same archives, prepared by TFDS as it is, as TFRecord."""
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("by_tfds")
    builder = tfds.builder("imagenet2012", data_dir=folder)
    config = tfds.download.DownloadConfig(manual_dir=manual_dir)
    builder.download_and_prepare(download_config=config, file_format="tfrecord")
    return folder


def records(data_dir, split):
    spec = {"source": "tfds", "name": "imagenet2012", "dir": str(data_dir), "split": split}
    source = open_source(spec)
    return source, source.fetch(np.arange(len(source)))


@pytest.mark.parametrize(("split", "count"), [("train", 14), ("validation", 5)])
def test_records_and_their_order_are_those_of_tfds(prepared, by_tfds, split, count):
    source, ours = records(prepared, split)
    _, theirs = records(by_tfds, split)
    assert (len(source), source.num_classes) == (count, 1000)
    assert ours.keys() == theirs.keys()
    for key, values in ours.items():
        np.testing.assert_array_equal(values, theirs[key], err_msg=key)
    by_name = dict(zip(ours["file_name"], ours["image"], strict=True))
    if split == "train":
        for name in (IN_CMYK, IN_PNG):
            image = Image.open(io.BytesIO(by_name[name.encode()]))
            assert (image.format, image.mode) == ("JPEG", "RGB")


def test_images_decode(prepared):
    source, _ = records(prepared, "train[50%:]")
    pp = "decode|resize(8)"
    (batch,) = eval_batches(source, batch_size=8, rows=np.arange(8), pp=pp)
    assert batch["image"].shape == (8, 8, 8, 3)


def test_a_tfrecord_build_is_converted_record_by_record(by_tfds, tmp_path, capsys):
    command = ["prepare", "imagenet2012", f"--tfrecord={by_tfds}", f"--data_dir={tmp_path}"]
    assert main(command) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert list(folder.glob("*.array_record-00000-of-00001"))
    for split in ("train", "validation"):
        _, ours = records(tmp_path, split)
        _, theirs = records(by_tfds, split)
        np.testing.assert_array_equal(ours["file_name"], theirs["file_name"])
        np.testing.assert_array_equal(ours["image"], theirs["image"])


def test_an_interrupted_build_goes_on(manual_dir, tmp_path, monkeypatch):
    """Two files of the first split, then the power goes; the rest later, and nothing twice."""
    from tensorflow_datasets.core.utils import shard_utils

    monkeypatch.setattr(
        shard_utils.ShardConfig, "calculate_number_shards", classmethod(lambda *_: 4)
    )
    original, written = shards._write_part, []

    def write_part(part, folder):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(part.file_name)
        return original(part, folder)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write_part", write_part)
        with pytest.raises(KeyboardInterrupt):
            datasets.prepare("imagenet2012", str(tmp_path), str(manual_dir), lambda _: None)
    with pytest.raises(UserError, match="not prepared"):
        records(tmp_path, "train")

    first = list(written)
    monkeypatch.setattr(
        shards,
        "_write_part",
        lambda part, folder: written.append(part.file_name) or original(part, folder),
    )
    monkeypatch.setattr(imagenet_tars, "read_index", only_validation(imagenet_tars.read_index))
    lines = []
    datasets.prepare("imagenet2012", str(tmp_path), str(manual_dir), lines.append)
    assert "train: 2 of 4 files are there already" in lines
    assert len(written) == len(set(written)) == 8
    assert written[:2] == first
    assert len(records(tmp_path, "train")[0]) == 14


def only_validation(read_index):
    def read(split, archive):
        assert split == "validation", "the training archive had been indexed before"
        return read_index(split, archive)

    return read


def test_copies_and_checks(prepared, tmp_path, capsys, monkeypatch):
    counts = {"train": 14, "validation": 5}
    monkeypatch.setattr(imagenet_tars, "COUNTS", counts)
    command = ["prepare", "imagenet2012", f"--data_dir={prepared}"]
    assert main([*command, "--check"]) == 0
    shown = capsys.readouterr().err
    assert "train: 14 records in 1 files" in shown
    assert "checksums agree" in shown
    assert main([*command, f"--copy_to={tmp_path}/bucket"]) == 0
    copied = Path(capsys.readouterr().out.strip())
    assert main(["prepare", "imagenet2012", f"--data_dir={tmp_path}/bucket", "--check"]) == 0

    assert main([*command, f"--copy_to={tmp_path}/bucket"]) == 0
    assert "files:" not in capsys.readouterr().err, "nothing is copied twice"

    (damaged,) = copied.glob("*-validation.*")
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(UserError, match="has changed since it was written"):
        datasets.check("imagenet2012", f"{tmp_path}/bucket")
    damaged.unlink()
    with pytest.raises(UserError, match="is missing"):
        datasets.check("imagenet2012", f"{tmp_path}/bucket")
    monkeypatch.setitem(counts, "train", 1_281_167)
    with pytest.raises(UserError, match="has 14 images; ImageNet has 1281167"):
        datasets.check("imagenet2012", str(prepared))


def test_archives_are_checked_by_md5(manual_dir, capsys, monkeypatch):
    command = ["prepare", "imagenet2012", "--check", f"--manual_dir={manual_dir}"]
    assert main(command) == 2
    assert "not 1d675b47d978889d74fa0da5fadfb00e; fetch it again" in capsys.readouterr().err
    sums = {
        split: hashlib.md5((manual_dir / name).read_bytes()).hexdigest()
        for split, name in imagenet_tars.ARCHIVES.items()
    }
    monkeypatch.setattr(imagenet_tars, "MD5", sums)
    assert main(command) == 0
    assert capsys.readouterr().err.count("MD5 agrees") == 2


def test_without_archives_it_says_what_to_do(tmp_path, capsys):
    assert main(["prepare", "imagenet2012", f"--data_dir={tmp_path}"]) == 2
    shown = capsys.readouterr().err
    assert "ILSVRC2012_img_train.tar" in shown
    assert f"{tmp_path}/downloads/manual" in shown
    assert "--tfrecord=DIR" in shown


def test_archives_that_are_cut_off_or_none(manual_dir, tmp_path):
    whole = (manual_dir / imagenet_tars.ARCHIVES["validation"]).read_bytes()
    path = tmp_path / imagenet_tars.ARCHIVES["validation"]
    path.write_bytes(whole[: len(whole) // 2 + 100])
    with pytest.raises(UserError, match="fetch it again"):
        imagenet_tars.read_index("validation", path)
    path.write_bytes(b"<html>log in first</html>")
    with pytest.raises(UserError, match="fetch it again"):
        imagenet_tars.read_index("validation", path)


def fill_half(source, folder, split):
    """An archive whose space is reserved and whose first half has come; returns the whole."""
    path = source / imagenet_tars.ARCHIVES[split]
    whole = path.read_bytes()
    half = len(whole) // 2
    (folder / path.name).write_bytes(whole[:half] + bytes(len(whole) - half))
    return whole


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("train", r"img_train\.tar holds \d+ images of [123] synsets; ImageNet has 14 images of 4"),
        ("validation", r"img_val\.tar holds [1234] images; ImageNet has 5 images"),
    ],
)
def test_a_half_filled_archive_is_refused(manual_dir, tmp_path, split, message):
    whole = fill_half(manual_dir, tmp_path, split)
    for _ in range(2):  # Nothing of it is remembered.
        with pytest.raises(UserError, match=message):
            datasets.prepare("imagenet2012", str(tmp_path / "data"), str(tmp_path), lambda _: None)
    (tmp_path / imagenet_tars.ARCHIVES[split]).write_bytes(whole)
    datasets.prepare("imagenet2012", str(tmp_path / "data"), str(tmp_path), lambda _: None)
    assert len(records(tmp_path / "data", split)[0]) == imagenet_tars.COUNTS[split]


def test_validation_labels_go_by_the_number_in_the_name():
    import tensorflow_datasets as tfds

    labels = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()
    names = np.array([f"ILSVRC2012_val_{number:08d}.JPEG" for number in (50000, 7, 1)])
    images = imagenet_tars.Images(names, *[np.zeros(3, int)] * 3)
    found = imagenet_tars._labels("validation", images)
    assert found.tolist() == [labels[49999], labels[6], labels[0]]
    with pytest.raises(UserError, match=r"img_val\.tar holds cat\.jpg, which"):
        imagenet_tars._labels("validation", images._replace(names=np.array(["cat.jpg"])))


def test_another_archive_is_indexed_again_and_its_files_begin_anew(
    manual_dir, tmp_path, monkeypatch
):
    """As where an attempt of an earlier version had taken half an archive for a whole one."""
    archive = tmp_path / imagenet_tars.ARCHIVES["validation"]
    whole = (manual_dir / archive.name).read_bytes()
    archive.write_bytes(tar_of([("ILSVRC2012_val_00000003.JPEG", b"an image")]))
    write = shards.write

    def write_and_break_off(*arguments):
        write(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(imagenet_tars, "COUNTS", {"validation": 1})
        patch.setattr(shards, "write", write_and_break_off)
        with pytest.raises(KeyboardInterrupt):
            datasets.prepare("imagenet2012", str(tmp_path / "data"), str(tmp_path), lambda _: None)
    archive.write_bytes(whole)
    lines = []
    datasets.prepare("imagenet2012", str(tmp_path / "data"), str(tmp_path), lines.append)
    assert not [line for line in lines if "there already" in line]
    assert len(records(tmp_path / "data", "validation")[0]) == 5


def test_an_archive_with_another_date_keeps_what_was_written(manual_dir, tmp_path):
    folder = tmp_path / "building"
    folder.mkdir()
    archive = tmp_path / "val.tar"
    archive.write_bytes((manual_dir / imagenet_tars.ARCHIVES["validation"]).read_bytes())
    written = folder / "imagenet2012-validation.array_record-00000-of-00001"
    written.write_bytes(b"records")
    (folder / shards.CHECKSUMS).write_text(json.dumps({written.name: shards.checksum(written)}))
    for time in (1, 2):
        os.utime(archive, (time, time))
        imagenet_tars._kept_index("imagenet2012", "validation", archive, folder)
    assert written.exists()


def test_a_damaged_index_is_made_anew(manual_dir, tmp_path):
    index = "imagenet2012", "validation", manual_dir / imagenet_tars.ARCHIVES["validation"]
    expected = imagenet_tars._kept_index(*index, tmp_path)
    (tmp_path / "index-validation.npz").write_bytes(b"PK\3\4" + bytes(99))
    found = imagenet_tars._kept_index(*index, tmp_path)
    np.testing.assert_array_equal(found.offsets, expected.offsets)


def test_a_finished_dataset_without_a_split_whose_archive_is_there(manual_dir, tmp_path, capsys):
    name = imagenet_tars.ARCHIVES["validation"]
    (tmp_path / name).write_bytes((manual_dir / name).read_bytes())
    command = ["prepare", "imagenet2012", f"--data_dir={tmp_path}/data"]
    assert main([*command, f"--manual_dir={tmp_path}"]) == 0
    assert main([*command, f"--manual_dir={tmp_path}"]) == 0
    capsys.readouterr()
    assert main([*command, f"--manual_dir={manual_dir}"]) == 2
    assert "is finished, without the split 'train' of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tfrecord=nowhere"], "needs --data_dir"),
        (["--tfrecord=nowhere", "--data_dir=there"], "holds no dataset"),
        (["--check", "--data_dir=nowhere"], "prepare it first"),
        (["--data_dir=gs://bucket/x"], "--copy_to=gs://"),
        (["--tfrecord=here", "--data_dir=./here"], "another folder"),
        (["--check", "--manual_dir=m", "--tfrecord=t"], "--tfrecord does not go with --check"),
        (["--check", "--manual_dir=m", "--copy_to=c"], "--copy_to does not go with --check"),
        (["--check", "--manual_dir=m", "--data_dir=d"], "--data_dir does not go with --check"),
        (["--check", "--manual_dir=~/m"], "/home/of/someone/m/ILSVRC2012_img_train.tar is missing"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/of/someone")
    assert main(["prepare", "imagenet2012", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_archives_of_another_dataset_cannot_be_checked(capsys):
    assert main(["prepare", "digits", "--check", "--manual_dir=m"]) == 2
    assert "goes with imagenet2012 alone" in capsys.readouterr().err


def test_the_default_folder_may_be_a_bucket_too(monkeypatch):
    bucket = types.SimpleNamespace(data_path=epath.Path("gs://bucket/tfds/imagenet2012/5.1.0"))
    monkeypatch.setattr(datasets, "find_builder", lambda *_, **__: bucket)
    monkeypatch.setattr(datasets, "is_prepared", lambda _: False)
    with pytest.raises(UserError, match=r"gs://bucket/tfds/\S+: datasets are written to a local"):
        datasets.prepare("imagenet2012")


def test_a_bucket_that_cannot_be_reached_is_told(monkeypatch):
    import tensorflow_datasets as tfds

    def fail(*_, **__):
        raise RuntimeError("NotFoundError: Could not find directory gs://bucket/tfds")

    monkeypatch.setattr(tfds, "builder", fail)
    with pytest.raises(UserError, match="cannot open the dataset 'imagenet2012': NotFoundError"):
        datasets.find_builder("imagenet2012", "gs://bucket/tfds")


def test_checksums_are_noted_for_every_file(prepared):
    (folder,) = (prepared / "imagenet2012").iterdir()
    noted = json.loads((folder / shards.CHECKSUMS).read_text())
    assert noted.keys() == {path.name for path in folder.glob("*.array_record-*")}


def test_two_processes_do_not_prepare_into_one_folder(tmp_path):
    taken = pytest.raises(UserError, match="another process prepares")
    with shards._alone_in(tmp_path), taken:
        shards.write([], tmp_path, print)
    assert shards.write([], tmp_path, print) == {}


def test_files_of_another_source_are_written_again(tmp_path):
    """An interrupted call leaves some, and the next one may name another source."""
    source, folder, written = tmp_path / "source", tmp_path / "building", []

    def write():
        def read():
            written.append(source.read_bytes())
            yield written[-1]

        return shards.write([shards.Part("a", 1, read, shards.origin_of(source))], folder, print)

    for content in (b"first", b"first", b"other"):
        if not source.exists() or source.read_bytes() != content:
            source.write_bytes(content)
            os.utime(source, ns=(0, len(written) + 1))
        sums = write()
    assert written == [b"first", b"other"]
    assert shards.is_same(sums["a"], shards.checksum(folder / "a"))
    for count in (0, 2):
        part = shards.Part("b", 1, lambda count=count: iter([b"x"] * count))
        with pytest.raises(UserError, match=f"b: {count} records came, 1 were expected"):
            shards.write([part], folder, print)
    (folder / shards.CHECKSUMS).write_text("{")
    with pytest.raises(UserError, match=r"checksums\.json is damaged .*delete it"):
        write()


def test_a_copy_replaces_files_of_equal_size_whose_checksums_differ(tmp_path, monkeypatch):
    source, bucket = tmp_path / "digits", tmp_path / "bucket"
    info = types.SimpleNamespace(full_name="digits/1.0.0")
    builder = types.SimpleNamespace(data_path=epath.Path(source), info=info)
    monkeypatch.setattr(datasets, "find_builder", lambda *_: builder)
    source.mkdir()
    copied = bucket / "digits" / "1.0.0"

    def prepare(content):
        for name in ("a", "dataset_info.json"):
            (source / name).write_bytes(content)
        (source / shards.CHECKSUMS).write_text(json.dumps({"a": shards.checksum(source / "a")}))

    def copy(*, until=""):
        """Returns the copied files; it is interrupted before the file `until`."""
        told = []

        def tell(line):
            told.append(line.rpartition("/")[2])
            if told[-1] == until:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            datasets.copy("digits", "", str(bucket), tell)
        return told

    prepare(b"first")
    everything = ["a", "checksums.json", "dataset_info.json"]
    assert copy() == everything
    assert copy() == []
    prepare(b"other")
    assert copy(until="a") == ["a"]
    assert copy() == everything  # The checksums there are still those of before.
    assert [path.read_bytes() for path in map(copied.joinpath, ("a", "dataset_info.json"))] == [
        b"other",
        b"other",
    ]
    assert copy() == []
