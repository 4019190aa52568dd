"""Items made ahead in worker processes: the same items, in the same order, whatever their number.

What makes an item depends on its number alone (keyed randomness), so the work can be dealt out: worker w of W
makes items w, w + W, ... of the sequence. Tensors come back through shared memory. Workers leave the signals
that end a run to the process that started them: it finishes its step, and closes the loader.
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
"""How often a waiting process looks whether the other still lives."""
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

    ``build`` is called once in each of them and must be picklable: a function of a module, or a partial of
    one. Each process is up to ``ahead`` items early. An error of ours (`InputError`, `TroubleError`) is raised
    here as it is, another one, or a process that ends, as a `TroubleError` of one line. Closing the iterator
    ends the processes; so does the end of this one, however it comes.
    """
    if not numbers:
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy threads' locks, and a CUDA context
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
        ended = not process.is_alive()  # asked before looking: what it sent last is still taken
        try:
            kind, item = made.get(timeout=POLL_SECONDS)
        except queue.Empty:
            if ended:
                raise TroubleError(
                    f"loader: the process '{process.name}' ended while making item {number} "
                    f"({_reason(process.exitcode)}); the run can be started again and goes on from its last "
                    "checkpoint"
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
    """Take what is left in a queue, so that its process is not held up by it."""
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
    made.cancel_join_thread()  # nobody reads on, also where the parent was killed


def _put(made: Any, item: Any, stop: Any) -> bool:
    """Hand ``item`` over; False when it is wanted no more."""
    while not _orphaned_or(stop):
        try:
            made.put(item, timeout=POLL_SECONDS)
            return True
        except queue.Full:
            continue
    return False


def _linger(stop: Any) -> None:
    """Stay until all was taken: shared memory is handed over by the process that made it."""
    while not _orphaned_or(stop):
        stop.wait(POLL_SECONDS)


def _orphaned_or(stop: Any) -> bool:
    parent = multiprocessing.parent_process()
    return bool(stop.is_set()) or parent is None or not parent.is_alive()
