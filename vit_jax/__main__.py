"""The program: `vit-jax COMMAND ...`, or `python -m vit_jax COMMAND ...`.

The commands are in `cli/`. This file says how the process starts, and how it ends after an error.
"""

import contextlib
import errno
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence

from vit_jax import errors
from vit_jax.errors import UserError

_LAST_WORDS_SECONDS = 2.0
_REDELIVERY_SECONDS = 0.05
_CTRL_C = 128 + signal.SIGINT
_UNWOUND = (["train"], ["tpu"])
"""The commands that SIGTERM ends as Ctrl-C does: the launcher's own commands then end with it."""

_ONE_LINE = (
    UserError
    | errors.DoesNotFit
    | errors.Diverged
    | errors.LostProcess
    | errors.CannotSave
    | errors.WrongExport
)
"""Errors whose message says all that a person needs."""


_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)

_EXTRAS = {
    "huggingface_hub": "hub",
    "sentencepiece": "text",
    "tokenizers": "text",
    "wandb": "wandb",
}
"""The extra of setup.cfg that installs a package, where it is not `train`."""


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived while there was nothing to save."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code of the process (see `vit_jax.errors`).

    Args:
      argv: the arguments of the command; None for those of this process, which then ends with it.
    """
    is_program = argv is None
    argv = list(sys.argv[1:] if argv is None else argv)
    handler = logging.StreamHandler()
    handler.setFormatter(_Visible("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    _silence_echoes()
    try:
        code = _exit_code_of(argv)
    except Exception:
        if not is_program:
            raise
        traceback.print_exc()
        code = errors.FAILURE
    if is_program:
        _end_at_once_if_unsafe(code)
    return code


def _exit_code_of(argv: list[str]) -> int:
    try:
        with _sigterm_raises() if argv[:1] in _UNWOUND else contextlib.nullcontext():
            # Imported here so that a signal that arrives meanwhile ends the process in one line.
            from vit_jax.cli import parser

            return parser.run(argv) or 0
    except errors.Interrupted as notice:
        _tell(str(notice))
        return notice.exit_code
    except KeyboardInterrupt as interrupt:
        return _interrupted(interrupt)
    except BrokenPipeError:
        sys.stderr.close()
        return errors.FAILURE
    except Exception as error:
        behind = _interrupt_behind(error)
        return _interrupted(behind) if behind else _failed(error)


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Makes SIGTERM raise `Terminated`, as Ctrl-C raises `KeyboardInterrupt`.

    Until the first step a run has nothing to save, and ends by leaving all its `with` blocks. From
    then on `StopSignal` handles both signals.
    """

    def raise_terminated(*_: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, raise_terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _interrupt_behind(error: BaseException | None) -> KeyboardInterrupt | None:
    """Returns the interrupt that a library turned into another error, if that is what happened."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return error
        error = error.__cause__ or error.__context__
    return None


def _interrupted(interrupt: KeyboardInterrupt) -> int:
    if isinstance(interrupt, Terminated):
        print("SIGTERM: stopped before a step could be lost; the same command goes on",
              file=sys.stderr)  # fmt: skip
        return errors.Interrupted.exit_code
    print("interrupted", file=sys.stderr)
    return _CTRL_C


def _end_at_once_if_unsafe(code: int) -> None:
    """Ends this process here if the usual end of the interpreter could crash it.

    A thread that is still compiling cannot be stopped. A signal may have interrupted a library in
    the middle of its import or of a call, which it then does not survive to clean up after.
    """
    background = sys.modules.get("vit_jax.training.background")
    is_busy = background is not None and background.is_busy()
    is_interrupted = code in (errors.Interrupted.exit_code, _CTRL_C)
    # Several processes leave their cluster together, which the usual end does for them.
    if is_busy or (is_interrupted and not _is_one_of_many()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _failed(error: Exception) -> int:
    """Prints an error, in one line if its message says all, and returns the exit code."""
    if _is_one_of_many() and (lost := _lost_process(error)):
        error = errors.LostProcess(lost)
    if isinstance(error, _ONE_LINE):
        _tell(f"error: {error}")
        return _leave(error.exit_code)
    if errors.is_out_of_memory(error):
        _tell(
            f"error: out of memory ({errors.first_line(error)}): try more config.accum_steps,"
            " config.model.remat=full or a smaller config.batch_size;"
            " `plan --fit` looks for what fits"
        )
        return _leave(errors.FAILURE)
    if isinstance(error, OSError) and (line := _of_files(error)):
        _tell(f"error: {line}")
        return _leave(UserError.exit_code)
    if isinstance(error, ModuleNotFoundError) and error.name and not _is_ours(error.name):
        print(f"error: {_missing(error.name)}", file=sys.stderr)
        return _leave(UserError.exit_code)
    if not _is_one_of_many():
        raise error
    traceback.print_exc()
    return _leave(errors.FAILURE)


def _tell(line: str) -> None:
    """Prints a line to the standard error. Names from files cannot act on the terminal."""
    errors.show(line, sys.stderr)


class _Visible(logging.Formatter):
    """Formats log records so that names from files cannot act on the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return errors.visible_lines(super().format(record))


def _of_files(error: OSError) -> str:
    """Returns one line about a file of the user's, or a disk, that cannot be used; "" for others.

    A file of this package that cannot be read is a fault of the package.
    """
    name = error.filename if isinstance(error.filename, str) else ""
    if name.startswith(os.path.dirname(__file__)) or not error.strerror:
        return ""
    if name:
        return f"{name}: {error.strerror}"
    return error.strerror if error.errno in _DISK_ERRORS else ""


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == __package__


def _missing(module: str) -> str:
    """Returns one line about a package that this interpreter lacks, and how to get it."""
    name = module.partition(".")[0]
    return (
        f"{name} is not installed for {sys.executable}; run ./run.sh, or activate its .venv, or"
        f" install the extra {_EXTRAS.get(name, 'train')!r} of vit-jax"
    )


def _silence_echoes() -> None:
    """Keeps libraries from printing an error that this module prints in one line.

    Orbax prints the stack of a failed save from dozens of background tasks, whose event loop is
    closed by the time that the rest of them ends. An interrupt that arrives within a callback of
    the interpreter is printed and lost: it is delivered again.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    show = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        error = unraisable.exc_value
        if isinstance(error, KeyboardInterrupt):
            number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
            # From another thread: here, within the callback, it would be lost again.
            threading.Timer(_REDELIVERY_SECONDS, os.kill, (os.getpid(), number)).start()
        elif str(error) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = hook


def _is_one_of_many() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _lost_process(error: Exception) -> str:
    """Returns one line if all that went wrong is that another process of this run is gone."""
    from vit_jax.parallel.processes import lost_process

    line = lost_process(error)
    advice = "start all processes again, and the run goes on from its last checkpoint"
    return line and f"lost another process of this run ({line}); {advice}"


def _leave(code: int) -> int:
    """Returns the exit code of a failed process; one of several processes ends here instead.

    The others may be waiting for it in a collective operation, and it would wait for them at the
    end of the interpreter. They learn that it has failed only when it is gone. What fails one
    process often fails all, so each gets a moment to print its error before the first one ends.
    """
    if _is_one_of_many():
        sys.stdout.flush()
        sys.stderr.flush()
        if code != errors.LostProcess.exit_code:
            time.sleep(_LAST_WORDS_SECONDS)
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
