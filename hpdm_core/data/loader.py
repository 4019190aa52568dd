"""Prepares items in worker processes: the same items, in the same order, for any number of workers.

An item depends on its number alone (keyed randomness), so worker w of W makes items w, w + W, ... of the
sequence. Tensors are returned through shared memory. Workers ignore the signals that end a run: their parent
process handles them, finishes its step and closes the loader.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.multiprocessing
from torch.multiprocessing.reductions import init_reductions

from hpdm_core.base.errors import InputError, TroubleError

__all__ = ["Make", "in_processes"]

Item = TypeVar("Item")
Make = Callable[[int], Item]

POLL_SECONDS = 0.5
"""How often a waiting process checks whether the other one is alive."""
CLOSING_SECONDS = 5.0
LEFT_TO_THE_PARENT = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")
_ENDINGS = {
    signal.SIGKILL: "killed, perhaps because memory is short",
    signal.SIGBUS: "shared memory is full: /dev/shm",
}


def in_processes(
    build: Callable[[], Make[Item]], numbers: Sequence[int], *, workers: int, ahead: int
) -> Iterator[Item]:
    """Yield ``build()(number)`` for each of ``numbers``, made in ``workers`` processes.

    ``build`` is called once in each process and must be picklable: a module-level function, or a partial of
    one. Each process prepares up to ``ahead`` items in advance. An `InputError` or `TroubleError` in a process
    is raised here unchanged; any other error, or the end of a process, is raised as a one-line `TroubleError`.
    The processes end when the iterator is closed and when this process ends, even if it is killed.
    """
    if not numbers:
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy locks of threads and a CUDA context
    init_reductions()  # type: ignore[no-untyped-call]  # torch leaves it untyped: tensors by shared memory
    stop = context.Event()
    queues = [context.Queue(maxsize=ahead) for _ in range(workers)]
    processes = [
        context.Process(
            target=_work,
            args=(build, list(numbers[index::workers]), made, stop),
            name=f"hpdm-loader-{index}",
            daemon=True,
        )
        for index, made in enumerate(queues)
    ]
    try:
        for process in processes:
            process.start()
        for place, number in enumerate(numbers):
            yield _next(queues[place % workers], processes[place % workers], number)
    finally:
        stop.set()
        for made in queues:
            _empty(made)
        for process in processes:
            if process.pid is not None:
                process.join(CLOSING_SECONDS)
                if process.is_alive():
                    process.kill()
                    process.join()
        for made in queues:
            _empty(made)
            made.close()


def _next(made: Any, process: Any, number: int) -> Any:
    while True:
        ended = not process.is_alive()  # before reading the queue: its last item is still received
        try:
            kind, item = made.get(timeout=POLL_SECONDS)
        except queue.Empty:
            if ended:
                raise TroubleError(
                    f"loader: the process '{process.name}' ended while making item {number} "
                    f"({_reason(process.exitcode)}); start the run again: it resumes from its last checkpoint"
                ) from None
            continue
        if kind == "item":
            return item
        if kind == "input":
            raise InputError(*item)
        raise TroubleError(*item)


def _reason(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return _ENDINGS.get(signal.Signals(-code), f"signal {signal.Signals(-code).name}")
    return f"exit code {code}"


def _empty(made: Any) -> None:
    """Empty a queue, so that the process that writes to it can end."""
    with contextlib.suppress(queue.Empty, EOFError, OSError, RuntimeError):
        while True:
            made.get_nowait()


# In a worker


def _work(build: Callable[[], Make[Any]], numbers: Sequence[int], made: Any, stop: Any) -> None:
    for name in LEFT_TO_THE_PARENT:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    number = None
    try:
        make = build()
        for number in numbers:
            if not _put(made, ("item", make(number)), stop):
                break
    except InputError as error:
        _put(made, ("input", error.messages), stop)
    except TroubleError as error:
        _put(made, ("trouble", error.messages), stop)
    except Exception as error:
        said = " ".join(str(error).split()) or "no message"
        what = "opening the data" if number is None else f"making item {number}"
        _put(made, ("trouble", (f"loader: {what} failed: {type(error).__name__}: {said}",)), stop)
    _linger(stop)
    made.cancel_join_thread()  # do not wait for a reader: none is left, even if the parent was killed


def _put(made: Any, item: Any, stop: Any) -> bool:
    """Put ``item`` into the queue; return False if the loader has been closed."""
    while not _orphaned_or(stop):
        try:
            made.put(item, timeout=POLL_SECONDS)
            return True
        except queue.Full:
            continue
    return False


def _linger(stop: Any) -> None:
    """Wait until the loader is closed: shared memory is available only while the process that made it is alive."""
    while not _orphaned_or(stop):
        stop.wait(POLL_SECONDS)


def _orphaned_or(stop: Any) -> bool:
    parent = multiprocessing.parent_process()
    return bool(stop.is_set()) or parent is None or not parent.is_alive()
