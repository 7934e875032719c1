"""A second version of a dataset, whose images are encoded anew."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import odd_images
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_sample_images

from vit_jax.__main__ import main
from vit_jax.data import images, open_source
from vit_jax.data.prepare import datasets, shards
from vit_jax.data.stored import Form, compare
from vit_jax.errors import UserError


@pytest.fixture(scope="module")
def photographs():
    """Windows of two photographs, as JPEG files of high quality."""
    pictures = [Image.fromarray(x) for x in load_sample_images().images]
    windows = [picture.crop((x, x, x + 320, x + 240)) for picture in pictures for x in (0, 120)]
    return [odd_images.encoded(window, "JPEG", quality=98) for window in windows]


class Photographs(tfds.core.GeneratorBasedBuilder):
    """Labeled photographs, in two splits."""

    VERSION = tfds.core.Version("1.0.0")
    images: list

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=["china", "flower"]),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate(0), "test": self._generate(2)}

    def _generate(self, first):
        for number in range(first, 4):
            yield number, {"image": np.asarray(self.images[number]), "label": number // 2}

    def _generate_examples(self):
        raise NotImplementedError


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, photographs):
    folder = str(tmp_path_factory.mktemp("tfds"))
    Photographs.images = [images.pixels(data) for data in photographs]
    with contextlib.redirect_stderr(io.StringIO()) as told:
        datasets.prepare("photographs", folder)
    assert "examples/s]" not in told.getvalue()  # No bars of TFDS outside a terminal.
    return folder


def opened(data_dir, name, split="train"):
    return open_source({"source": "tfds", "name": name, "dir": data_dir, "split": split})


def test_the_second_version_is_a_dataset_with_smaller_images(data_dir, capsys):
    argv = ["prepare", "photographs", f"--data_dir={data_dir}", "--store=q90,max_side=160"]
    assert main(argv) == 0
    out = capsys.readouterr()
    assert out.out.strip() == f"{data_dir}/photographs_q90_160/1.0.0"
    assert "of 4 images: " in out.err
    assert "PSNR" in out.err
    for split in ("train", "test"):
        old, new = (
            opened(data_dir, name, split) for name in ("photographs", "photographs_q90_160")
        )
        assert (len(old), old.class_names) == (len(new), new.class_names)
        assert old.fingerprint != new.fingerprint
        rows = np.arange(len(old))
        before, after = old.fetch(rows), new.fetch(rows)
        np.testing.assert_array_equal(before["label"], after["label"])
        for one, other in zip(before["image"], after["image"], strict=True):
            assert images.header(one).size == (240, 320)
            assert images.header(other).size == (120, 160)
            assert len(other) < len(one) / 2
    check = ["prepare", "photographs_q90_160", f"--data_dir={data_dir}", "--check"]
    assert main(check) == 0
    assert "checksums agree" in capsys.readouterr().err
    report = Path(data_dir, "photographs_q90_160/1.0.0/stored.json")
    for content in ("{}", None):  # A finished dataset stays as it is.
        report.write_text(content) if content else report.unlink()
        files = sorted((path, path.stat().st_mtime_ns) for path in report.parent.iterdir())
        assert main(argv) == 0
        assert "of 4 images: " in capsys.readouterr().err
        assert files == sorted((path, path.stat().st_mtime_ns) for path in report.parent.iterdir())


def test_an_interrupted_call_is_resumed(data_dir, monkeypatch):
    written, write = [], shards._write_part

    def interrupted(part, folder):
        written.append(part.file_name)
        if len(written) == 2:
            raise KeyboardInterrupt
        return write(part, folder)

    monkeypatch.setattr(shards, "_write_part", interrupted)
    argv = ["prepare", "photographs", f"--data_dir={data_dir}", "--store=q80"]
    with contextlib.suppress(KeyboardInterrupt):
        main(argv)
    with pytest.raises(UserError):
        opened(data_dir, "photographs_q80")
    assert main(argv) == 0
    assert [name.partition(".")[0] for name in written] == [
        "photographs_q80-train", "photographs_q80-test", "photographs_q80-test",
    ]  # fmt: skip
    assert len(opened(data_dir, "photographs_q80")) == 4
    report = json.loads(Path(data_dir, "photographs_q80/1.0.0/stored.json").read_text())
    assert report["source"] == "photographs/1.0.0"
    assert report["difference"]["bytes_after"] < report["difference"]["bytes_before"]


def test_crops_of_photographs_stay_close(photographs):
    found = compare(photographs, [Form(90).encode(data) for data in photographs])
    assert 38 < found.psnr < 60
    assert 0 < found.mae < 3
    assert compare(photographs, photographs).mae == 0


def test_a_jpeg_that_would_grow_stays_as_it_is(photographs):
    small = Form(50).encode(photographs[0])
    assert Form(95).encode(small) == small
    assert Form(95, 100).encode(small) != small
    # Stored images are read as they are, so that no reader may turn one of them.
    turned = odd_images.turned(odd_images.photograph(), 6, quality=30)
    assert images.header(Form(95).encode(turned)).orientation == 1
    gray = odd_images.encoded(odd_images.photograph().convert("L"), "PNG")
    assert Image.open(io.BytesIO(Form(90).encode(gray))).mode == "L"


@pytest.mark.parametrize("text", ["90", "q0", "q101", "q90,512", "q90,max_side=0", "png", ""])
def test_a_form_that_is_none_is_answered(text):
    with pytest.raises(UserError, match=r"write q90, or q90,max_side=512"):
        Form.parse(text)


def test_what_has_no_photographs_is_not_stored(tmp_path):
    argv = ["prepare", "digits", f"--data_dir={tmp_path}"]
    assert main([*argv, "--store=q90"]) == 2
    assert main(argv) == 0
    assert main([*argv, "--store=q90"]) == 2
