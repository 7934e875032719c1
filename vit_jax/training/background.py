"""Work on a thread that the end of the process does not wait for."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_NAME = "vit-background"

Result = TypeVar("Result")


def start(function: Callable[[], Result]) -> Future[Result]:
    """Calls `function` on a daemon thread and returns the future of its result.

    The threads of `concurrent.futures` are joined when the interpreter ends, so an error on the
    main thread would appear only after the compiler is done, which takes minutes for a large model.
    """
    future: Future[Result] = Future()

    def call() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, name=_NAME, daemon=True).start()
    return future


def is_busy() -> bool:
    """Returns whether such a thread is still running.

    The process must then end by `os._exit`, because a normal end of the interpreter would free the
    memory that the thread uses.
    """
    return any(thread.name == _NAME for thread in threading.enumerate())
