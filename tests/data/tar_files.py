"""Tar files with given members, made in memory."""

import io
import tarfile


def tar_of(members):
    """Returns the bytes of a tar file with (name, content) of each member."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()
