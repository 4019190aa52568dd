"""The exponential moving average of the weights over training. Samples and metrics use it."""

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from hpdm_core.training.shards import local

__all__ = ["WeightAverage"]

Network = TypeVar("Network", bound=nn.Module)


class WeightAverage(Generic[Network]):
    """An exponential moving average of every parameter and buffer of ``model``.

    ``average <- d * average + (1 - d) * current`` with ``d = 0.5 ** (1 / halflife)``, starting at the initial
    weights: after ``halflife`` (> 0) updates, the earlier average has weight 1/2. Tensors that are not floating
    point are copied. ``average`` is a module like ``model``, in evaluation mode, without gradients.
    """

    def __init__(self, model: Network, *, halflife: float) -> None:
        self.average: Network = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = 0.5 ** (1 / halflife)
        self._blend = get_ema_multi_avg_fn(self.decay)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def update(self, model: Network) -> None:
        """Move the average towards the weights of ``model``."""
        average, current = _tensors(self.average), _tensors(model)
        real = [index for index, tensor in enumerate(average) if tensor.is_floating_point()]
        self._blend([average[index] for index in real], [current[index] for index in real], 0)
        for index in set(range(len(average))) - set(real):
            average[index].copy_(current[index])


def _tensors(model: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of ``model``; if it is sharded, this process's parts of them."""
    return [local(tensor.detach()) for tensor in (*model.parameters(), *model.buffers())]
