"""The IDX files of the MNIST family: what is read, and what is refused."""

import gzip
import struct

import numpy as np
import pytest

from vit_jax.config import load
from vit_jax.data import open_source
from vit_jax.errors import UserError
from vit_jax.training.run import Run
from vit_jax.training.stages import stages_of

IMAGES = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3)
LABELS = np.array([0, 1, 2, 0, 3, 1], np.uint8)


def idx(array, kind=8):
    header = struct.pack(f">2xBB{array.ndim}I", kind, array.ndim, *array.shape)
    return header + array.tobytes()


def write(folder, split="train", images=IMAGES, labels=LABELS, *, prefix="", pack=gzip.compress):
    folder.mkdir(exist_ok=True)
    end = ".gz" if pack is gzip.compress else ""
    for what, array, rank in (("images", images, 3), ("labels", labels, 1)):
        file = folder / f"{prefix}{split}-{what}-idx{rank}-ubyte{end}"
        file.write_bytes(pack(idx(array)))


@pytest.mark.parametrize("pack", [gzip.compress, bytes], ids=["gzipped", "plain"])
def test_the_arrays_of_a_split_are_read(tmp_path, pack):
    write(tmp_path, pack=pack)
    write(tmp_path, "t10k", IMAGES[:2], LABELS[:2], pack=pack)
    spec = {"source": "idx", "name": str(tmp_path)}
    part = open_source(spec | {"split": "train[2:]"})
    records = part.fetch(np.array([2, 0]))
    np.testing.assert_array_equal(records["image"], IMAGES[[4, 2], ..., None])
    assert records["label"].tolist() == [3, 2]
    assert records["label"].dtype == np.int32
    assert "record 4 of" in part.describe(2)
    # The test split lacks the classes 2 and 3.
    test = open_source(spec | {"split": "test", "class_names": list("abcd")})
    assert (len(test), test.num_classes, test.class_names) == (2, 4, tuple("abcd"))


def test_files_may_lie_beside_their_copies_but_not_beside_others(tmp_path):
    spec = {"source": "idx", "name": str(tmp_path)}
    for split in ("train", "t10k"):
        write(tmp_path, split)
        write(tmp_path, split, pack=bytes)
    write(tmp_path, "test")
    for split in ("train", "test"):
        images = open_source(spec | {"split": split}).fetch(np.arange(len(IMAGES)))["image"]
        np.testing.assert_array_equal(images[..., 0], IMAGES)
    write(tmp_path, images=IMAGES[::-1])
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte and \S+ubyte\.gz differ; remove"):
        open_source(spec)
    write(tmp_path, "test", labels=LABELS[::-1])
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte and \S+test-labels-.*differ"):
        open_source(spec | {"split": "test"})


def test_images_are_not_paired_with_the_labels_of_another_dataset(tmp_path):
    write(tmp_path, "t10k", pack=bytes)
    (tmp_path / "test-images-idx3-ubyte").write_bytes(WHOLE)
    spec = {"source": "idx", "name": str(tmp_path), "split": "test"}
    for message in (
        "t10k-images-idx3-ubyte and test-images.*, but t10k-",
        "has test-.*, but t10k-",
    ):
        with pytest.raises(UserError, match=message):
            open_source(spec)
        (tmp_path / "t10k-images-idx3-ubyte").unlink(missing_ok=True)


def test_one_of_several_datasets_is_named_after_the_folder(tmp_path):
    for number, prefix in enumerate(("emnist-letters-", "emnist-digits-")):
        write(tmp_path, labels=LABELS + np.uint8(number), prefix=prefix)
    spec = {"source": "idx", "name": f"{tmp_path}/emnist-letters"}
    assert open_source(spec).num_classes == 4
    with pytest.raises(UserError, match=r"2 datasets; write one .*/emnist-digits$"):
        open_source(spec | {"name": str(tmp_path)})
    with pytest.raises(UserError, match="did you mean 'emnist-letters'"):
        open_source(spec | {"name": f"{tmp_path}/emnist-leters"})


WHOLE = idx(IMAGES)
BAD = {
    "cut short": (WHOLE[:-1], "announces 72 values, it has 71"),
    "longer than announced": (WHOLE + b"x", "announces 72 values, it has more"),
    "cut in the header": (WHOLE[:10], "unpack requires"),
    "of another kind": (b"\x89PNG\r\n", "not an IDX file"),
    "of floats": (idx(IMAGES, 0x0D), "values of type 0x0d; only unsigned bytes"),
    "of labels": (idx(LABELS), r"holds an array \[6\]; images are"),
    "of more images": (idx(np.concatenate([IMAGES] * 2)), r"holds an array \[6\] for 12 images"),
    "of a huge size": (struct.pack(">2xBB3I", 8, 3, 2**31, 2**15, 2**15), "values, more than"),
    "empty": (b"", "not an IDX file"),
    "with a damaged stream": (gzip.compress(WHOLE)[:-12], "ended before the end-of-stream"),
    "with flipped bytes": (gzip.compress(WHOLE)[:20] + bytes(9), "CRC check failed|invalid"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_a_bad_file_is_named_in_one_line(tmp_path, content, message):
    write(tmp_path, pack=bytes)
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        open_source({"source": "idx", "name": str(tmp_path)})
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"split": "validation"}, r"no images of the split 'validation'; it has files of train"),
        ({"class_names": ["a", "b", "c", "a"]}, "two classes 'a'"),
        ({"class_names": ["a", "b"]}, r"2 names, but the labels in .* go up to 3"),
        ({"name": "/nowhere/at/all"}, "no such folder: /nowhere/at"),
    ],
)
def test_a_wrong_argument_is_answered(tmp_path, args, message):
    write(tmp_path)
    with pytest.raises(UserError, match=message):
        open_source({"source": "idx", "name": str(tmp_path)} | args)


def test_a_folder_without_such_files_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no files named like train-images-idx3-ubyte"):
        open_source({"source": "idx", "name": str(tmp_path)})


def test_the_recipe_reads_files_or_tensorflow_datasets(request, tmp_path):
    recipe = f"{request.config.rootpath}/configs/fashion_mnist.py"
    config = load(f"{recipe}:data={tmp_path},validate")
    assert (config.data.source, config.data.name) == ("idx", str(tmp_path))
    assert dict(config.eval.sets.val) == {"split": "train[50000:]"}
    plain = load(recipe)
    assert (plain.data.source, plain.eval.sets.test.split) == ("tfds", "test")
    fast = recipe.replace("fashion", "speedrun_fashion")
    off = "epochs=18,curriculum=none,drop=0.0,sharpen=False"
    assert load(f"{fast}:{off}").to_dict() == plain.to_dict()
    with pytest.raises(UserError, match="did you mean 'images'"):
        load(f"{fast}:curriculum=image")


@pytest.mark.parametrize(
    ("curriculum", "patch", "side"), [("images", (1, 1), (16, 28)), ("patches", (7, 4), (28, 28))]
)
def test_the_stages_of_the_fast_recipe_have_one_state(request, tmp_path, curriculum, patch, side):
    write(tmp_path, images=np.zeros((6, 28, 28), np.uint8))
    recipe = f"{request.config.rootpath}/configs/speedrun_fashion_mnist.py"
    arguments = f"data={tmp_path},curriculum={curriculum},runlocal"
    tasks = {
        stage.end: stage.run.task for stage in stages_of(Run.build(load(f"{recipe}:{arguments}")))
    }
    assert [*tasks] == [6, 9, 10]
    backbones = [task.model.backbone for task in tasks.values()]
    assert [backbone.patch_size for backbone in backbones] == [patch[0], patch[1], patch[1]]
    assert [task.image_spec.shape[0] for task in tasks.values()] == [side[0], side[1], side[1]]
    assert [backbone.patch_drop for backbone in backbones] == [0.25, 0.0, 0.0]
    assert [task.label_smoothing for task in tasks.values()] == [0.1, 0.1, 0.0]
