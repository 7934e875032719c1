"""TensorBoard events in `WORKDIR/tensorboard/`, through tensorboardX, which needs no TensorFlow.

Events are written at once and by the thread that logs them, with tensorboardX's `EventsWriter`. Its
`SummaryWriter` hands them to a thread. If that thread meets a full disk it ends, and the next ten
rows block the run for ever. It also rewrites names (`iou/pickup truck` to `iou/pickup_truck`), and
its `flush` does not wait for the thread.
"""

import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from vit_jax import storage
from vit_jax.tracking.rows import Scalar

EVENTS_NAME = "tensorboard"


class Writer:
    """Writes scalars, images and the config as TensorBoard events.

    The config is a text, and its numbers, texts and switches are hyperparameters, so that runs can
    be told apart.

    TensorBoard hides what an earlier attempt at the run logged past the step it resumes from.

    On an object store, where files cannot be appended to, the event file grows in a local scratch
    directory and is copied at `flush`.
    """

    def __init__(self, workdir: epath.Path, *, resume_step: int, config: Mapping[str, Any]):
        self._config = config
        self._directory = workdir / EVENTS_NAME
        self._resume_step = resume_step
        self._scratch: str | None = None
        self._file: Any = None
        self._files = 0

    def write(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        """Writes a value for each name."""
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=x) for name, x in scalars.items()]
        self._add(step, summary=Summary(value=values))

    def image(self, step: int, name: str, png: bytes) -> None:
        """Writes a picture, given as the bytes of a PNG file."""
        from PIL import Image
        from tensorboardX.proto.summary_pb2 import Summary

        width, height = Image.open(io.BytesIO(png)).size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._add(step, summary=Summary(value=[Summary.Value(tag=name, image=image)]))

    def flush(self) -> None:
        """Copies the events to the object store; on a file system they are there already."""
        if self._scratch is None:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        for path in epath.Path(self._scratch).iterdir():
            path.copy(self._directory / path.name, overwrite=True)

    def close(self) -> None:
        """Closes the file, after a last copy to an object store."""
        try:
            if self._file is not None:
                self._file.close()
            self.flush()
        finally:
            self._file = None
            if self._scratch is not None:
                shutil.rmtree(self._scratch, ignore_errors=True)

    def _add(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._file = self._file or self._open()
        try:
            self._file.write_event(Event(wall_time=time.time(), step=step, **content))
            self._file.flush()
        except OSError:
            # The file may end in half an event, and readers stop there: the next goes to a new one.
            self._file = None
            raise

    def _open(self) -> Any:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        local = os.fspath(self._directory)
        if storage.is_remote(self._directory):
            local = self._scratch = self._scratch or tempfile.mkdtemp(prefix="vit_jax_events_")
        os.makedirs(local, exist_ok=True)
        is_continued = self._directory.exists() and any(self._directory.iterdir())
        # The name holds seconds; the suffix keeps a quick restart from overwriting the file.
        suffix = f".from{self._resume_step}" + (f".{self._files}" if self._files else "")
        self._files += 1
        file = EventsWriter(os.path.join(local, "events"), suffix)
        if self._config and not is_continued and self._files == 1:
            self._describe(file)
        if is_continued and self._files == 1:
            start = SessionLog(status=SessionLog.START)
            file.write_event(Event(step=self._resume_step + 1, session_log=start))
        return file

    def _describe(self, file: Any) -> None:
        """Writes the config, which a continued run has written before."""
        from tensorboardX import summary
        from tensorboardX.proto.event_pb2 import Event

        lines = json.dumps(self._config, indent=2, default=str).splitlines()
        block = "\n".join("    " + line for line in lines)
        told = [summary.text("config", block)]
        told += summary.hparams(hyperparameters(self._config), {})
        for one in told:
            file.write_event(Event(wall_time=time.time(), summary=one))


def hyperparameters(config: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar | str]:
    """Returns the numbers, texts and switches of a config by dotted key; lists become texts."""
    found: dict[str, Scalar | str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= hyperparameters(value, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float | str):
            found[prefix + key] = value
        elif value is not None:
            found[prefix + key] = json.dumps(value, default=str)
    return found
