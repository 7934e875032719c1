"""`plan` tells the cores and the reads from object stores that feeding takes."""

import json

import pytest

from vit_jax import config as config_lib
from vit_jax.bench import input as bench
from vit_jax.cli.commands import plan
from vit_jax.errors import UserError
from vit_jax.planning.feeding import Feeding, Rate, read_rate


def imagenet():
    config = config_lib.default_config()
    config.data.source, config.data.name = "tfds", "imagenet2012"
    config.data.pp = "decode_jpeg_and_inception_crop(32)|flip_lr"
    return config_lib.validate(config)


def test_rows_of_a_slice():
    feeding = Feeding.of(imagenet(), 64_000.0, 4, Rate(800.0, "by hand"))
    assert feeding.cores == 80
    # A quarter of 115.4 kB an image and of a request for 1,251 images.
    assert feeding.bytes_per_sec == pytest.approx(16_000 * 115_440, rel=1e-3)
    assert feeding.requests_per_sec == pytest.approx(12.79, rel=1e-3)
    rows = dict(feeding.rows())
    assert rows["images to feed"] == "64,000/s at the least step time, to 4 hosts"
    assert rows["host cores"] == "80, 20 a host (by hand)"
    assert rows["from an object store"].startswith("1.85 GB/s and 12.79 requests/s a host")


def test_hosts_beyond_the_parts_of_an_epoch_share_what_they_read():
    few, many = (Feeding.of(imagenet(), 64_000.0, hosts, None) for hosts in (8, 64))
    assert few.bytes_per_sec == many.bytes_per_sec


def test_what_is_not_known_is_not_made_up():
    config = imagenet()
    config.data.name = "cifar10"
    rows = dict(Feeding.of(config, 1000.0, 1, None).rows())
    assert "not known" in rows["host cores"]
    assert "from an object store" not in rows


def test_rate_of_a_measurement(tmp_path):
    file = tmp_path / "bench.json"
    file.write_text(json.dumps({"images_per_sec_per_core": 812.4}))
    assert read_rate(str(file)) == Rate(812.4, f"812 images/s a core, says {file}")


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "FileNotFound"), ("{}", "KeyError"), ("[", "JSONDecode"),
     ('{"images_per_sec_per_core": 0}', "says 0.0 images")],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, text, message):
    file = tmp_path / "bench.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=message):
        read_rate(str(file))


def test_measured_here_on_photographs(monkeypatch):
    seen = []

    def bench_input(config, batches):
        seen.append((config.data.source, config.data.args.encoded, config.data.pp))
        return {"images_per_sec_per_core": 640.0}

    monkeypatch.setattr(bench, "bench_input", bench_input)
    assert plan._rate_here(imagenet()).images_per_sec_per_core == 640
    assert seen == [("fake", True, "decode_jpeg_and_inception_crop(32)|flip_lr")]
