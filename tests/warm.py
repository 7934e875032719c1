"""Processes of the program that start in a moment, for tests that kill them or run several.

Importing JAX, TensorFlow and Orbax takes ten seconds of one core, most of what a short training
takes. One server imports them; each process is a fork of it, made before JAX has started a backend.
"""

import ctypes
import importlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

LARGEST_FILE = "LARGEST_FILE_BYTES"
"""An environment variable: writing a larger file fails in the process, as on a full disk."""

XLA_FLAGS = os.environ.get("XLA_FLAGS", "").replace("--xla_force_host_platform_device_count=8", "")
"""Those of the tests, which compile in half the time, but for one device."""

ROOT = Path(__file__).parents[1]
PRELOADED = (
    "matplotlib.pyplot", "orbax.checkpoint", "tensorflow", "vit_jax.bench.model",
    "vit_jax.cli.parser", "vit_jax.cli.commands.train", "vit_jax.training.loop",
)  # fmt: skip
_SET_CHILD_SUBREAPER = 36  # Of prctl(2).
_LONGEST_REQUEST = 1 << 20


class Popen(subprocess.Popen):
    """`subprocess.Popen` of the program with the arguments `args`, its output as text.

    Linux alone lets this process adopt a fork of another; elsewhere the program starts as usual.
    """

    _server = None

    def __init__(self, args, **kwargs):
        if sys.platform != "linux":
            args = [sys.executable, "-m", "vit_jax", *args]
        super().__init__(args, text=True, **kwargs)

    if sys.platform == "linux":

        def _execute_child(self, args, *rest):
            """Asks the server for a fork whose parent becomes this process."""
            environment, pipes = rest[5] or dict(os.environ), rest[9:15]
            outputs = [pipes[3] if pipes[3] >= 0 else 1, pipes[5] if pipes[5] >= 0 else 2]
            server = self._connect()
            libc = ctypes.CDLL(None)
            libc.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            request = {"args": [str(arg) for arg in args], "environment": environment}
            socket.send_fds(server, [json.dumps(request).encode()], outputs)
            self.pid = int(server.recv(32))
            libc.prctl(_SET_CHILD_SUBREAPER, 0, 0, 0, 0)  # Orphans of other tests go to init.
            self._child_created = True
            self._close_pipe_fds(*pipes)

        @classmethod
        def _connect(cls):
            if cls._server is None:
                cls._server, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                subprocess.Popen(
                    [sys.executable, __file__, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    env={**os.environ, "XLA_FLAGS": XLA_FLAGS, "PYTHONPATH": str(ROOT)},
                )
                theirs.close()
            return cls._server


def run(args, **kwargs):
    """Runs the program to its end, as `subprocess.run` does."""
    with Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs) as process:
        stdout, stderr = process.communicate(timeout=300)
    return subprocess.CompletedProcess(args, process.returncode, stdout, stderr)


def wait_for_step(process, step):
    """Reads what a run says until it has done a step."""
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith(f"step {step}/"):
            return
    raise AssertionError(f"the run ended before step {step}: {''.join(said)}")


def serve(connection):
    """Forks a process for each request, until the tests have ended."""
    for name in PRELOADED:
        importlib.import_module(name)
    while True:
        request, outputs, _, _ = socket.recv_fds(connection, _LONGEST_REQUEST, 2)
        if not request:
            return
        reader, writer = os.pipe()
        between = os.fork()
        if not between:
            pid = os.fork()
            if not pid:
                os.close(writer)
                connection.close()
                become(json.loads(request), outputs)
                return
            os.write(writer, str(pid).encode())
            os._exit(0)
        os.waitpid(between, 0)  # From now on the process belongs to the tests.
        connection.send(os.read(reader, 32))
        for descriptor in (reader, writer, *outputs):
            os.close(descriptor)


def become(request, outputs):
    """Runs the program in this process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, output in zip((1, 2), outputs, strict=True):
        os.dup2(output, descriptor)
        os.close(output)
    os.environ.clear()
    os.environ.update(request["environment"])
    if LARGEST_FILE in os.environ:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        size = int(os.environ[LARGEST_FILE])
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    sys.argv = ["vit_jax", *request["args"]]
    from vit_jax.__main__ import main
    from vit_jax.training import pictures

    pictures.write_report = lambda workdir: None  # A third of the work of a short run.
    sys.exit(main())


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
