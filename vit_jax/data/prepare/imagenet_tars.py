"""ImageNet (ILSVRC 2012), built from the two archives that image-net.org distributes.

    ILSVRC2012_img_train.tar    a tar of 1,000 tars, n01440764.tar and so on
    ILSVRC2012_img_val.tar      50,000 images; their labels come with TFDS

The result equals `imagenet2012` of TFDS, record for record and in the same order (images are sorted
by a hash of their names), so `train[99%:]` has the same images everywhere. Unlike the build of
TFDS, this one shows its progress and can be resumed: the archives are indexed once, and each file
is then written directly from the positions of its images in the archive.
"""

import functools
import hashlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vit_jax.data.prepare import shards
from vit_jax.errors import UserError, first_line, program

NAME = "imagenet2012"
ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}
COUNTS = {"train": 1_281_167, "validation": 50_000}
SYNSETS = 1000
# The checksums that image-net.org lists.
MD5 = {
    "train": "1d675b47d978889d74fa0da5fadfb00e",
    "validation": "29b22e2961454d5413ddabcf34fc5622",
}
_RECORD_OVERHEAD = 100
"""The approximate bytes of a record besides its image; the number of files depends on the total."""


class Images(NamedTuple):
    """The images of an archive: names, synsets ("" in validation), offsets, and sizes in bytes."""

    names: np.ndarray
    synsets: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray


def explain(manual_dir: Path) -> str:
    """Returns the instructions for downloading ImageNet manually."""
    lines = [
        f"ImageNet is not in {manual_dir}, and cannot be fetched without an account. Either",
        f"  1. register at https://image-net.org/download-images, put {ARCHIVES['train']}",
        f"     (147,897,477,120 bytes) and {ARCHIVES['validation']} (6,744,924,160 bytes) into",
        f"     {manual_dir}, or into DIR with --manual_dir=DIR, and run this again; or",
        "  2. if you have a TFDS build as TFRecord, convert it: --tfrecord=DIR; or",
        "  3. train on a folder as it is, ROOT/train/n01440764/*.JPEG and ROOT/val/...:",
        f"     {program()} train --config=configs/vit_s16_i1k.py:data=ROOT --workdir=...",
    ]
    return "\n".join(lines)


def build(builder: Any, manual_dir: Path, tell: shards.Tell) -> None:
    """Writes the dataset of the archives in `manual_dir`. Raises `UserError` if there are none.

    A single archive gives a dataset with one split.
    """
    folder = shards.building_folder(builder)
    found = {s: manual_dir / name for s, name in ARCHIVES.items() if (manual_dir / name).exists()}
    if not found:
        raise UserError(explain(manual_dir))
    folder.mkdir(parents=True, exist_ok=True)
    lengths = {}
    for split, archive in found.items():
        tell(f"{split}: indexing {archive}")
        images = in_order(split, _kept_index(builder.name, split, archive, folder))
        labels = _labels(split, images)
        parts = _parts(builder, split, archive, images, labels)
        tell(f"{split}: {len(images.names)} images into {len(parts)} files")
        shards.write(parts, folder, shards.telling_of(split, tell))
        lengths[split] = [part.num_records for part in parts]
    for split in found:
        (folder / f"index-{split}.npz").unlink()
    shards.finish(builder, lengths, folder)


def refuse_missing_splits(builder: Any, manual_dir: Path) -> None:
    """Raises `UserError` if a finished dataset lacks a split whose archive is in `manual_dir`."""
    for split, name in ARCHIVES.items():
        if (manual_dir / name).exists() and split not in builder.info.splits:
            raise UserError(
                f"{builder.data_path} is finished, without the split {split!r} of"
                f" {manual_dir / name}; move that folder away and run this again for both"
            )


def read_index(split: str, archive: Path) -> Images:
    """Returns the images of an archive in the order of their positions.

    Raises:
      UserError: the archive is truncated, is not a tar, or does not contain all of ImageNet.
    """
    rows = []
    try:
        with tarfile.open(archive, "r:") as outer:
            for member in outer:
                if split != "train":
                    rows.append((member.name, "", member.offset_data, member.size))
                    continue
                window = _Window(outer.fileobj, member.offset_data, member.size)
                with tarfile.open(fileobj=window, mode="r:") as inner:
                    synset = Path(member.name).stem
                    rows += [
                        (image.name, synset, member.offset_data + image.offset_data, image.size)
                        for image in inner
                        if image.isfile()
                    ]
    except Exception as error:  # `tarfile` raises errors of any type for damaged headers.
        raise UserError(
            f"{archive} is damaged or incomplete ({first_line(error)}); fetch it again"
        ) from error
    if not rows:
        raise UserError(f"{archive} holds no images; fetch it again")
    size = archive.stat().st_size
    if rows[-1][2] + rows[-1][3] > size:
        raise UserError(f"{archive} is cut off after {size} bytes; fetch it again")
    images = Images(*(np.array(column) for column in zip(*rows, strict=True)))
    _check_counts(split, archive, images)
    return images


def _check_counts(split: str, archive: Path, images: Images) -> None:
    """Raises a `UserError` if an archive has fewer images than ImageNet.

    The size of the file is no sufficient check: some download tools reserve the space of the whole
    file first. The missing part then consists of zeros, which mark the end of a tar.
    """
    found, expected = f"{len(images.names)} images", f"{COUNTS[split]} images"
    if split == "train":
        found += f" of {len(np.unique(images.synsets))} synsets"
        expected += f" of {SYNSETS} synsets"
    if found != expected:
        raise UserError(f"{archive} holds {found}; ImageNet has {expected}; fetch it again")


def check_archives(manual_dir: Path, tell: shards.Tell) -> None:
    """Compares the MD5 of the archives with those of image-net.org. Raises `UserError`."""
    for split, name in ARCHIVES.items():
        archive = manual_dir / name
        if not archive.exists():
            raise UserError(f"{archive} is missing")
        tell(f"{archive}: reading {archive.stat().st_size} bytes")
        with archive.open("rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found != MD5[split]:
            raise UserError(f"{archive} has MD5 {found}, not {MD5[split]}; fetch it again")
        tell(f"{archive}: MD5 agrees")


class _Window(io.RawIOBase):
    """A readable file that consists of a part of another file."""

    def __init__(self, file: Any, start: int, size: int):
        self._file, self._start, self._size, self._at = file, start, size, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        self._file.seek(self._start + self._at)
        data = self._file.read(left if size < 0 else min(size, left))
        self._at += len(data)
        return data


def _kept_index(dataset: str, split: str, archive: Path, folder: Path) -> Images:
    """Returns `read_index`, cached on disk, because indexing the real archive takes minutes.

    If the archive changes, it is indexed again, and files written from the old one are deleted.
    """
    kept = folder / f"index-{split}.npz"
    status = archive.stat()
    stamp = [status.st_size, status.st_mtime_ns]
    former = _load(kept)
    if np.array_equal(former.get("stamp", []), stamp):
        return Images(*(former[column] for column in Images._fields))
    images = read_index(split, archive)._asdict()
    if former and not all(np.array_equal(former[name], images[name]) for name in images):
        shards.forget(folder, f"{dataset}-{split}.")
    unfinished = kept.with_suffix(".incomplete.npz")
    np.savez(unfinished, stamp=stamp, **images)
    unfinished.rename(kept)
    return Images(**images)


def _load(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a kept index; {} where there is none, or a damaged one."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception:  # Whatever is wrong with it, the index can be made anew.
        return {}


def in_order(split: str, images: Images) -> Images:
    """Returns the images in the order of TFDS: by MD5 of their names, salted with the split."""

    def key(row: int) -> bytes:
        return hashlib.md5(f"{split}{images.names[row]}".encode()).digest()

    order = sorted(range(len(images.names)), key=key)
    return Images(*(column[order] for column in images))


def _labels(split: str, images: Images) -> np.ndarray:
    """Returns the synset of every image."""
    if split == "train":
        return images.synsets
    import tensorflow_datasets as tfds

    path = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")
    labels = path.read_text().split()
    by_name = {f"ILSVRC2012_val_{i:08d}.JPEG": label for i, label in enumerate(labels, 1)}
    for name in images.names:
        if name not in by_name:
            raise UserError(
                f"{ARCHIVES[split]} holds {name}, which ImageNet's has not; fetch it again"
            )
    return np.array([by_name[name] for name in images.names])


def _parts(
    builder: Any, split: str, archive: Path, images: Images, labels: np.ndarray
) -> list[shards.Part]:
    from tensorflow_datasets.core.utils import shard_utils

    count = len(images.names)
    size = int(images.sizes.sum()) + count * _RECORD_OVERHEAD
    num_files = shard_utils.ShardConfig.calculate_number_shards(size, count)
    ends = shard_utils.get_shard_boundaries(count, num_files)
    return [
        shards.Part(
            shards.file_name(builder.name, split, number, num_files),
            end - start,
            functools.partial(_records, builder, archive, images, labels, range(start, end)),
        )
        for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True))
    ]


def _records(
    builder: Any, archive: Path, images: Images, labels: np.ndarray, rows: range
) -> Iterator[bytes]:
    """Yields serialized examples, with TFDS's corrections of CMYK images and the one PNG image."""
    from tensorflow_datasets.core import example_serializer

    features = builder.info.features
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    with archive.open("rb") as file:
        for row in rows:
            name = str(images.names[row])
            file.seek(int(images.offsets[row]))
            image = io.BytesIO(file.read(int(images.sizes[row])))
            example = {
                "file_name": name,
                "image": builder._fix_image(name, image),
                "label": str(labels[row]),
            }
            yield serializer.serialize_example(features.encode_example(example))
