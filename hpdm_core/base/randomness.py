"""Keyed random streams: the only place in the project where a random generator is made.

The key of a stream lists everything that it may depend on, for example ``(seed, "noise", step, index of the sample in
the global batch, level)``. Study, arm, batch size, process and earlier draws are never in a key. Therefore all arms of
a seed share clips, crops, sigmas and noise, a resumed run continues exactly, and sample ``i`` is the same in any batch.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["generator", "keyed_global_rng", "normal", "stream_seed"]


def stream_seed(*key: int | str) -> int:
    """Return the 63-bit seed of the stream called ``key`` (integers and strings; SHA-256 of their text)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(*key: int | str) -> torch.Generator:
    """Return a fresh CPU generator at the start of the stream called ``key``."""
    made = torch.Generator()
    made.manual_seed(stream_seed(*key))
    return made


def normal(shape: Sequence[int], *key: int | str) -> Tensor:
    """Return unit Gaussian noise of ``shape`` (float32, CPU): the first draw of the stream called ``key``."""
    return torch.randn(tuple(shape), generator=generator(*key))


@contextmanager
def keyed_global_rng(*key: int | str) -> Iterator[None]:
    """Within the block, torch's global generator starts from the seed of the stream called ``key``.

    For code that cannot take a generator, such as the constructors of ``torch.nn`` layers inside a plugin. The global
    state of the CPU is restored on leaving.
    """
    with torch.random.fork_rng(devices=[]):
        torch.random.set_rng_state(generator(*key).get_state())
        yield
