"""Tar files with given members, made in memory."""

import io
import os
import tarfile


def tar_of(members, kind=tarfile.DEFAULT_FORMAT, mtime=0):
    """Returns the bytes of a tar file with (name, content) of each member."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), mtime
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def idx_of(content, sort=lambda members: members):
    """Returns the text that `wds2idx` of NVIDIA DALI writes for a tar file."""
    samples = {}
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for member in sort([one for one in tar if one.isreg()]):
            base, _, end = os.path.basename(member.name).partition(".")
            if base:
                key = os.path.join(os.path.dirname(member.name), base)
                part = f"{end} {member.offset_data} {member.size} {member.name}"
                samples.setdefault(key, []).append(part)
    return f"v1.2 {len(samples)}\n" + "".join(f"{' '.join(x)}\n" for x in samples.values())
