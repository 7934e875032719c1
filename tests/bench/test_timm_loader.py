"""Measuring against timm: what is compared, and what is said where it cannot be."""

import sys

import pytest

from vit_jax.__main__ import main
from vit_jax.bench import input as bench
from vit_jax.bench import timm_loader
from vit_jax.config import load
from vit_jax.errors import UserError


@pytest.mark.parametrize(
    ("pp", "expected"),
    [
        ("decode_jpeg_and_inception_crop(224)|flip_lr", (224, None)),
        ("decode_jpeg_and_inception_crop(224)|flip_lr|randaug(2,10)", (224, "rand-m10-n2")),
    ],
)
def test_the_same_augmentation_in_timms_words(pp, expected):
    assert timm_loader.transforms_of(pp) == expected


def test_other_preprocessing_is_refused():
    with pytest.raises(UserError, match="with or without"):
        timm_loader.transforms_of("decode|resize(224)")


def command(root):
    config = f"--config={root}/configs/vit_s16_i1k.py:runlocal"
    return ["bench", "input", config, "--against=timm", "--config.compilation_cache="]


def test_without_timm_it_says_what_to_install(request, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(bench, "bench_input", lambda *_: {"images_per_sec": 1.0})
    assert main(command(request.config.rootpath)) == 2
    assert "pip install -e '.[bench]'" in capsys.readouterr().err


def test_it_takes_turns(request, monkeypatch):
    config = load(f"{request.config.rootpath}/configs/vit_s16_i1k.py:runlocal")
    rates, seconds = iter([900.0, 100.0, 900.0]), iter([2.0, 2.0, 1.0])
    monkeypatch.setattr(bench, "bench_input", lambda *_: {"images_per_sec": next(rates)})
    monkeypatch.setitem(bench.RIVALS, "timm", lambda *_: next(seconds))
    monkeypatch.setattr(bench.os, "sched_getaffinity", lambda _: {0, 1})
    found = bench.bench_against(config, "timm", batches=10)
    # Theirs: 80 images in 2, 2, 1 s.
    assert found["images_per_sec_per_core"] == 450
    assert found["timm_images_per_sec_per_core"] == 20
    assert found["timm_ratio"] == 11.25


def test_plain_tfrecords(request):
    config = load(f"{request.config.rootpath}/configs/vit_s16_i1k.py:runlocal")
    found = bench.bench_against(config, "tfrecord", batches=2, rounds=1)
    assert found["tfrecord_ratio"] > 0
    config.data.args.encoded = False
    with pytest.raises(UserError, match="needs encoded images"):
        bench.bench_against(config, "tfrecord")


def test_against_goes_with_input_alone(request, capsys):
    config = f"--config={request.config.rootpath}/configs/vit_s16_i1k.py:runlocal"
    assert main(["bench", "step", config, "--against=timm"]) == 2
    assert "goes with `bench input`" in capsys.readouterr().err


def test_timms_loader_itself(request):
    """Where timm is installed: so many uint8 images of the right size."""
    pytest.importorskip("torch", reason="needs the extra `bench`")
    from vit_jax.training.run import open_source

    config = load(f"{request.config.rootpath}/configs/vit_s16_i1k.py:runlocal")
    loader = timm_loader._loader(open_source(config.data), config.data.pp, 4, 2, 0)
    shapes = [tuple(images.shape) for images, _ in loader]
    assert shapes == [(4, 3, 32, 32)] * 2
