"""Causes for which a job ends without its results, and the classification of exceptions."""

from typing import Literal

from hpdm_core.base.errors import DivergedError, TroubleError
from hpdm_core.base.files import of_the_disk
from hpdm_core.store.lease import LeaseLost

__all__ = ["FAILURES", "Cause", "TimeLimit", "kind_of"]

Cause = Literal[
    "out of memory",
    "time limit",
    "lost node",
    "code error",
    "diverged",
    "preempted",
    "never started",
    "killed",
    "cancelled",
    "pruned",
    "full disk",
]
"""Why a job ended without its results. The first five are failures (`FAILURES`)."""

FAILURES: tuple[Cause, ...] = ("out of memory", "time limit", "lost node", "code error", "diverged")

MEMORY_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")
"""Texts by which torch, CUDA and the C library report lack of memory in errors without a class of their own."""
PEER_WORDS = ("connection closed by peer", "connection reset by peer", "remote process exited")
"""Texts by which gloo and NCCL report that another process of the same cell is gone."""


class TimeLimit(TroubleError):
    """A job reached its time limit before it could save any progress."""


def kind_of(error: BaseException) -> Cause:
    """Return the cause for ``error``, judged by it and by the exceptions that it was raised from."""
    current: BaseException | None = error
    seen = set()
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, DivergedError):
            return "diverged"
        if isinstance(current, TimeLimit):
            return "time limit"
        if isinstance(current, LeaseLost):
            return "lost node"
        if isinstance(current, MemoryError) or type(current).__name__ == "OutOfMemoryError":
            return "out of memory"
        if isinstance(current, RuntimeError | OSError):
            text = str(current).lower()
            if any(words in text for words in MEMORY_WORDS):
                return "out of memory"
            if isinstance(current, RuntimeError) and any(words in text for words in PEER_WORDS):
                return "lost node"
        current = current.__cause__ or current.__context__
    return "full disk" if of_the_disk(error) else "code error"
