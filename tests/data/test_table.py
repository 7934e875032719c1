"""Tables of images with labels: kinds of files, classes, splits, and what is wrong in a cell."""

import json
import os

import numpy as np
import odd_images
import pyarrow as pa
import pytest
from image_tables import LABELS, NAMES, lines, numbers, open_table, png, write
from pyarrow import parquet

from vit_jax.data import element_spec, train_batches
from vit_jax.data.sources import _table_files
from vit_jax.errors import UserError
from vit_jax.recipes import own_images

ROWS = list(zip(NAMES, LABELS, strict=True))
KINDS = {
    "t.csv": lines(("path", "label", "note"), *((*row, "x") for row in ROWS)),
    "t.tsv": lines(("label", "file"), *((b, a) for a, b in ROWS), sep="\t"),
    "t.jsonl": "\n".join(json.dumps({"image": a, "label": b}) for a, b in ROWS),
    "t.parquet": {"file_name": NAMES, "label": LABELS},
    "bytes.parquet": {"image": [png(10 * i) for i in range(6)], "label": LABELS},
    "struct.parquet": {
        "img": [{"bytes": png(10 * i), "path": "x.png"} for i in range(5)]
        + [{"bytes": None, "path": "g.png"}],
        "label": LABELS,
    },
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_table_holds_the_same_examples(folder, name):
    source = open_table(write(folder, name, KINDS[name]))
    assert source.class_names == ("cat", "dog", "emu")
    assert numbers(source) == [0, 1, 2, 3, 4, 5]
    records = source.fetch(np.array([3, 1, 0]))
    assert records["label"].tolist() == [2, 0, 1]
    assert records["label"].dtype == np.int32
    assert element_spec(source, "decode|resize(8)")["image"].shape == (8, 8, 3)
    assert source.blocks is None
    assert "\n" not in source.describe(2)


def test_splits_by_file_and_by_column_have_the_classes_of_training(folder):
    write(folder, "train.csv", lines(("path", "label"), *ROWS[:4]))
    val = write(folder, "val.csv", lines(("path", "label"), *ROWS[4:]))
    by_file = {"name": folder / "{split}.csv"}
    whole = [("path", "label", "split"), *((*row, "train") for row in ROWS[:4])]
    whole += [(*row, "Valid") for row in ROWS[4:]]
    by_column = {"name": write(folder, "all.csv", lines(*whole)), "split_column": "split"}
    for args in (by_file, by_column):
        assert numbers(open_table(split="train", **args)) == [0, 1, 2, 3]
        held_out = open_table(split="validation[1:]", **args)
        assert held_out.class_names == ("cat", "dog", "emu")
        assert numbers(held_out) == [5]
        assert held_out.fetch(np.array([0]))["label"].tolist() == [1]
    with pytest.raises(UserError, match=r"no rows of the split 'test'; its column 'split' has Val"):
        open_table(split="test", **by_column)
    with pytest.raises(UserError, match=r"has no split 'val': write '\{split\}' in its name"):
        open_table(val, "val")
    write(folder, "val.csv", lines(("path", "label"), ("e.png", "emus")))
    message = r"val.csv: line 2, column 'label': 'emus' is no class of the training .*mean 'emu'"
    with pytest.raises(UserError, match=message):
        open_table(split="val", **by_file)


def test_without_a_training_split_all_splits_have_the_same_classes(folder):
    rows = (("a b.png", "cat", "0"), ("e.png", "eel", "0"), ("f.png", "bee", "1"))
    by_column = {"name": write(folder, "all.csv", lines(("path", "label", "fold"), *rows))}
    by_column["split_column"] = "fold"
    write(folder, "val.csv", lines(("path", "label"), *(row[:2] for row in rows[:2])))
    write(folder, "testing.csv", lines(("path", "label"), rows[2][:2]))
    write(folder, "fold3.csv", lines(("path", "label"), ("g.png", "ant")))
    by_file = {"name": folder / "{split}.csv"}
    for args, first, second in ((by_column, "0", "1"), (by_file, "validation", "test")):
        for split, labels in ((first, [1, 2]), (second, [0])):
            source = open_table(split=split, **args)
            assert source.class_names == ("bee", "cat", "eel")
            assert source.labels.tolist() == labels
    assert open_table(split="fold3", **by_file).class_names == ("ant", "bee", "cat", "eel")


@pytest.mark.parametrize("secret", [("path",), ("path", "label")])
def test_a_test_set_without_labels_adds_no_class(folder, secret):
    write(folder, "val.csv", lines(("path", "label"), ("e.png", "10"), ("f.png", "2")))
    write(folder, "test.csv", lines(secret, ("g.png", "-1")[: len(secret)]))
    assert open_table(folder / "{split}.csv", "val").class_names == ("2", "10")


def test_a_training_split_is_read_once_for_all_splits(folder, monkeypatch):
    header = ("path", "label")
    write(folder, "train.csv", lines(header, ("a.png", "cat"), ("b.png", "dog")))
    write(folder, "val.csv", lines(header, ("c.png", "dog")))
    read, opened = [], _table_files.TextTable._open

    def reading(path):
        read.append(path)
        return opened(path)

    monkeypatch.setattr(_table_files.TextTable, "_open", staticmethod(reading))
    name = folder / "{split}.csv"
    assert open_table(name).class_names == open_table(name, "val").class_names == ("cat", "dog")
    assert [os.path.basename(path) for path in read] == ["train.csv", "val.csv"]
    write(folder, "train.csv", lines(header, ("a.png", "cat"), ("b.png", "dog"), ("c.png", "eel")))
    assert open_table(name, "val").class_names == ("cat", "dog", "eel")


def test_parts_and_folds_are_those_of_all_sources(folder):
    name = write(folder, "t.csv", lines(("path", "label", "who"), *((*r, r[0][0]) for r in ROWS)))
    assert numbers(open_table(name, "train[1:3]")) == [1, 2]
    held, rest = (open_table(name, f"train[{p}fold 1 of 3]", group="who") for p in ("", "all but "))
    assert sorted(numbers(held) + numbers(rest)) == [0, 1, 2, 3, 4, 5]
    assert len(open_table(name, "train[1 per class]")) == 3
    assert open_table(name, split_seed=2).fingerprint.endswith("t.csv:train:6:seed2")


def test_numbers_are_classes_in_the_order_of_numbers(folder):
    rows = [{"image": NAMES[i], "label": label} for i, label in enumerate((10, 9, 2.0, 10))]
    name = write(folder, "n.jsonl", "\n".join(map(json.dumps, rows)))
    source = open_table(name)
    assert source.class_names == ("2", "9", "10")
    assert source.fetch(np.arange(4))["label"].tolist() == [2, 1, 0, 2]


def test_the_order_of_the_classes_can_be_given(folder):
    name = write(folder, "t.csv", KINDS["t.csv"])
    (folder / "classes.txt").write_text("emu\ndog\ncat\ngnu\n")
    for names in (str(folder / "classes.txt"), ["emu", "dog", "cat", "gnu"]):
        source = open_table(name, class_names=names)
        assert source.num_classes == 4
        assert source.fetch(np.arange(6))["label"].tolist() == [1, 2, 1, 0, 2, 1]
    numbered = write(folder, "n.csv", lines(("path", "label"), ("e.png", "1"), ("f.png", "0")))
    assert open_table(numbered, class_names=["x", "y"]).fetch([0, 1])["label"].tolist() == [1, 0]
    with pytest.raises(
        UserError, match=r"line 3, column 'label': 'cat' is no class of config.data"
    ):
        open_table(name, class_names=["dog", "emu"])
    with pytest.raises(UserError, match="two classes 'a'"):
        open_table(name, class_names=["a", "a"])


SEVERAL = {
    "t.csv": ("path,label\ne.png,x|y\nf.png,\ng.png, z \n", {"separator": "|"}),
    "t.jsonl": (
        '{"image": "e.png", "label": ["x", "y"]}\n{"image": "f.png", "label": []}\n'
        '{"image": "g.png", "label": ["z"]}',
        {},
    ),
    "t.parquet": ({"image": ["e.png", "f.png", "g.png"], "label": [["y", "x"], None, ["z"]]}, {}),
    "columns.csv": (
        "path,x,y,z\ne.png,1,True,0\nf.png,,0,no\ng.png,0,0,1\n",
        {"label": ["x", "y", "z"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SEVERAL)
def test_images_may_have_several_labels(folder, name):
    content, args = SEVERAL[name]
    source = open_table(write(folder, name, content), **args)
    assert source.class_names == ("x", "y", "z")
    labels = source.fetch(np.arange(3))["label"]
    assert labels.dtype == np.uint8
    assert labels.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]


def test_weights_come_with_the_examples(folder):
    name = write(
        folder, "t.csv", lines(("path", "label", "w"), ("e.png", "a", "2"), ("f.png", "b", "0.5"))
    )
    records = open_table(name, weight="w").fetch(np.array([1, 0]))
    assert records["weight"].tolist() == [0.5, 2]
    assert records["weight"].dtype == np.float32


def hub(folder, *, features=None, split="train", images=6):
    """A dataset as the Hub stores it: shards, with the features in their metadata."""
    label = {"names": ["zero", "one", "two"], "_type": "ClassLabel"}
    features = features or {"image": {"_type": "Image"}, "label": label}
    table = pa.table(
        {
            "image": [{"bytes": png(10 * i), "path": None} for i in range(images)],
            "label": [i % 2 for i in range(images)],
        }
    )
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    (folder / "data").mkdir(exist_ok=True)
    for shard in range(2):
        part = table.slice(shard * images // 2, images // 2).replace_schema_metadata(metadata)
        file = folder / "data" / f"{split}-0000{shard}-of-00002.parquet"
        parquet.write_table(part, file, row_group_size=2)


def test_a_hugging_face_folder_names_its_classes(folder):
    hub(folder)
    hub(folder, split="validation", images=4)
    (folder / "README.md").write_text("a dataset")
    source = open_table(folder)
    assert source.class_names == ("zero", "one", "two")
    assert numbers(source) == [0, 1, 2, 3, 4, 5]
    assert source.fetch(np.array([3]))["label"].tolist() == [1]
    assert "train-00001-of-00002.parquet: row 1, column 'image'" in source.describe(4)
    assert len(open_table(folder, "val")) == 4
    with pytest.raises(UserError, match=r"has no split 'test'; it has train, validation"):
        open_table(folder, "test")
    converted = folder / "other" / "train"
    converted.mkdir(parents=True)
    os.replace(folder / "data/train-00000-of-00002.parquet", converted / "0000.parquet")
    assert len(open_table(folder / "other")) == 3
    with pytest.raises(UserError, match=r"holds 2 datasets; write one of them, as in .*data$"):
        open_table(folder)


def test_stored_class_numbers_are_numbers_even_of_classes_called_like_numbers(folder):
    label = {"names": ["0", "10", "1"], "_type": "ClassLabel"}
    hub(folder, features={"image": {"_type": "Image"}, "label": label})
    source = open_table(folder)
    assert source.fetch(np.arange(6))["label"].tolist() == [0, 1] * 3


def test_features_beside_the_files_name_the_classes(folder):
    feature = {"feature": {"names": ["p", "q", "r"], "_type": "ClassLabel"}, "_type": "Sequence"}
    (folder / "dataset_infos.json").write_text(
        json.dumps({"default": {"features": {"tags": feature}}})
    )
    write(folder, "data/train.parquet", {"image": [png(1)] * 2, "tags": [[0, 2], [1]]})
    source = open_table(folder)
    assert source.class_names == ("p", "q", "r")
    assert source.fetch(np.arange(2))["label"].tolist() == [[1, 0, 1], [0, 1, 0]]


def test_features_of_several_configurations_name_no_classes_unless_they_are_equal(folder, caplog):
    coarse, fine = (
        {"features": {"label": {"names": names, "_type": "ClassLabel"}}}
        for names in (["animal", "plant"], ["cat", "rose"])
    )
    name = write(folder, "fine.parquet", {"image": [png(1)] * 2, "label": [0, 1]})
    for second, classes in ((coarse, ("animal", "plant")), (fine, ("0", "1"))):
        (folder / "dataset_infos.json").write_text(json.dumps({"coarse": coarse, "fine": second}))
        assert not caplog.records
        assert open_table(name).class_names == classes
    assert "dataset_infos.json describes 2 configurations with different" in caplog.text


def test_files_of_one_table_name_the_same_classes(folder):
    hub(folder)
    label = {"names": ["one", "zero", "two"], "_type": "ClassLabel"}
    file = folder / "data/train-00001-of-00002.parquet"
    metadata = {"huggingface": json.dumps({"info": {"features": {"label": label}}})}
    parquet.write_table(parquet.read_table(file).replace_schema_metadata(metadata), file)
    with pytest.raises(UserError, match=r"00000-of\S+ and \S+00001-of\S+ name other classes of"):
        open_table(folder)


SHARDS = {
    "no such column": ({"img": [png(1)], "label": [0]}, "b.parquet has no columns 'image'"),
    "paths": (
        {"image": ["e.png"], "label": [0]},
        r"'image' holds bytes in \S+a.parquet, but texts in \S+b.parquet",
    ),
    "texts": (
        {"image": [png(1)], "label": ["cat"]},
        r"'label' holds numbers in \S+a.parquet, but texts in",
    ),
    "lists": ({"image": [png(1)], "label": [[1]]}, "'label' holds numbers in .* but lists in"),
    "structs": ({"image": [{"bytes": png(1)}], "label": [0]}, "holds bytes in .* but structs in"),
    "two such columns": (
        pa.table([pa.array([png(1)])] * 2 + [pa.array([0])], names=["image", "image", "label"]),
        "b.parquet has 2 columns 'image'",
    ),
}


@pytest.mark.parametrize("case", SHARDS)
def test_files_of_one_table_have_the_same_columns(folder, case):
    content, message = SHARDS[case]
    write(folder, "a.parquet", {"image": [png(0)], "label": [0]})
    second = content if isinstance(content, pa.Table) else pa.table(content)
    parquet.write_table(second, folder / "b.parquet")
    with pytest.raises(UserError, match=message):
        open_table(folder / "*.parquet")


def test_files_of_one_table_may_differ_in_what_makes_no_difference(folder):
    write(folder, "a.parquet", {"image": ["e.png"], "label": pa.array([3], pa.int8())})
    images = pa.array(["f.png"], pa.large_string())
    write(folder, "b.parquet", {"note": [1], "label": [4.0], "image": images})
    write(folder, "c.parquet", {"label": [3], "image": pa.array(["g.png"]).dictionary_encode()})
    source = open_table(folder / "*.parquet")
    assert (source.labels.tolist(), numbers(source)) == ([0, 1, 0], [3, 4, 5])
    name = write(folder, "d/t.parquet", {"image.small": [png(9)], "image": [png(20)], "label": [0]})
    assert numbers(open_table(name)) == [2]


def test_large_files_are_read_by_blocks_and_batches_are_the_same(folder, monkeypatch):
    name = write(folder, "t.parquet", KINDS["bytes.parquet"])
    small = open_table(name, "train[1:]")
    monkeypatch.setattr(_table_files, "KEPT_BYTES", 10)
    monkeypatch.setattr(_table_files, "_KEPT_BLOCKS", 1)
    large = open_table(name, "train[1:]")
    assert large.blocks.lengths == (1, 2, 2)
    rows = np.array([4, 0, 3, 1, 2])
    assert large.fetch(rows)["image"].tolist() == small.fetch(rows)["image"].tolist()
    with train_batches(
        large, batch_size=4, rows=np.arange(4), seed=0, pp="decode|resize(2)"
    ) as all_:
        whole = next(all_)
    with train_batches(
        large, batch_size=4, rows=np.arange(2, 4), seed=0, pp="decode|resize(2)"
    ) as half:
        np.testing.assert_array_equal(next(half)["image"], whole["image"][2:])


@pytest.mark.parametrize("is_struct", [False, True])
def test_few_bytes_do_not_become_an_image_in_every_row(folder, monkeypatch, is_struct):
    image, path = png(9) + bytes(20_000), folder / "t.parquet"
    images = [{"bytes": image, "path": "x.png"} if is_struct else image] * 300
    parquet.write_table(pa.table({"image": images, "label": [0, 1] * 150}), path)
    first, last = open_table(path).fetch(np.array([0, 299]))["image"]
    assert first == image
    assert first is last
    monkeypatch.setattr(_table_files, "_ALWAYS_UNFOLDED", 1 << 20)
    monkeypatch.setattr(_table_files, "_MAX_RATIO", 10)
    with pytest.raises(
        UserError, match=r"t\.parquet: row group 0 has .* bytes that stand for more"
    ):
        open_table(path).fetch(np.array([7]))


def test_equal_texts_of_a_file_are_one_object(folder):
    path = folder / "t.parquet"
    columns = {"image": ["a" * 500, None] * 4, "n": [[1], [2]] * 4}
    parquet.write_table(pa.table(columns), path)
    table = _table_files.ParquetTable([str(path)], is_of_split=False)
    table.load("image", ["n"])
    assert {name: table.values(name) for name in columns} == columns
    assert len(set(map(id, table.values("image")[::2]))) == 1


def test_tables_and_images_may_lie_on_an_object_store(folder):
    """TensorFlow reads `file://` by the same functions as `gs://`."""
    write(folder, "train.csv", lines(("path", "label"), *ROWS[3:]))
    assert numbers(open_table(f"file://{folder}/{{split}}.csv")) == [3, 4, 5]
    write(folder, "s-1.parquet", KINDS["bytes.parquet"])
    assert numbers(open_table(f"file://{folder}/s-*.parquet")) == [0, 1, 2, 3, 4, 5]
    write(folder, "bad.csv", lines(("path", "label"), ("../x.png", "a")))
    with pytest.raises(UserError, match=r"line 2, column 'path': '../x.png' is no path inside"):
        open_table(f"file://{folder}/bad.csv")
    with pytest.raises(UserError, match=r"gone.csv: .*No such file"):
        open_table(f"file://{folder}/gone.csv")


def test_a_hugging_face_folder_may_lie_on_an_object_store(folder):
    hub(folder)
    hub(folder, split="validation", images=4)
    source = open_table(f"file://{folder}/", "val")
    assert (len(source), source.class_names) == (4, ("zero", "one", "two"))
    assert numbers(source) == [0, 1, 2, 3]
    assert own_images.data_of(f"file://{folder}") == ("table", "train", "validation")
    write(folder, "plain/test/0.parquet", {"image": [png(1)], "label": [1]})
    label = {"names": ["p", "q"], "_type": "ClassLabel"}
    (folder / "plain/dataset_info.json").write_text(json.dumps({"features": {"label": label}}))
    assert open_table(f"file://{folder}/plain", "test").class_names == ("p", "q")
    with pytest.raises(UserError, match=r"write a table that ends in .*, or the folder of"):
        open_table(f"file://{folder}/gone")


@pytest.fixture
def on_hub(hub_server, folder):
    """A dataset on a stand-in for the hub, in Parquet and as a table of files."""
    hub(folder)
    hub(folder, split="validation", images=4)
    paths = sorted((folder / "data").glob("*.parquet"))
    contents = {f"data/{path.name}": path.read_bytes() for path in paths}
    contents |= {
        "photos/val.csv": b"path,label\nx.png,7\n",
        "photos/train.csv": b"path,label\nx.png,7\n",
        "halves/val/rows.csv": b"path,label\ny.png,7\n",
        "halves/val/y.png": png(4),
    }
    hub_server.repos["me/pets"] = contents | {"photos/x.png": png(3), "README.md": b"pets"}
    return hub_server


def test_a_dataset_of_the_hub_is_read_by_its_name(on_hub):
    source = open_table("hf://datasets/me/pets", "validation")
    assert (len(source), source.class_names) == (4, ("zero", "one", "two"))
    assert element_spec(open_table("hf://datasets/me/pets@main"), "decode")["image"].shape[2] == 3
    assert len(open_table("hf://datasets/me/pets/data/{split}-*.parquet")) == 6
    assert not any(
        "README" in path or "photos" in path for path in on_hub.fetched if "/resolve/" in path
    )
    assert own_images.data_of("hf://datasets/me/pets")[1:] == ("train", "validation")
    one_file = own_images.data_of("hf://datasets/me/pets/photos/val.csv")
    assert one_file[2] == "train[fold 1 of 10]"  # It is of no split.
    source = open_table("hf://datasets/me/pets/photos/{split}.csv", "val")
    assert source.fetch(np.array([0]))["image"][0] == png(3)
    source = open_table("hf://datasets/me/pets/halves/{split}/rows.csv", "val")
    assert source.fetch(np.array([0]))["image"][0] == png(4)
    assert own_images.data_of("hf://datasets/me/pets") == ("table", "train", "validation")
    for name, said in {
        "me/cats": "no such repository",
        "me/pets/x/*.parquet": r"has no files x/\*.parquet",
        "me": "write hf://datasets/USER/REPO",
    }.items():
        with pytest.raises(UserError, match=said):
            open_table(f"hf://datasets/{name}")


def test_a_table_on_the_web_is_read_with_its_images(on_hub):
    name = f"{on_hub.endpoint}/datasets/me/pets/resolve/main/photos/val.csv"
    source = open_table(name)
    assert source.fetch(np.array([0]))["image"][0] == png(3)
    with pytest.raises(UserError, match=r"gone\.csv: "):
        open_table(name.replace("val", "gone"))


def test_photographs_are_turned_upright(folder):
    for one in ("e.png", "f.png"):
        (folder / one).write_bytes(odd_images.turned(odd_images.photograph(), 8))
    name = write(folder, "t.csv", lines(("path", "label"), ("e.png", "a"), ("f.png", "b")))
    for exif, shape in (("apply", (32, 48, 3)), ("ignore", (48, 32, 3))):
        assert element_spec(open_table(name, exif=exif), "decode")["image"].shape == shape
