"""What the rules of counting say of a tensor's layout, against the kernels of the CPU."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from hpdm_core.model.counting import Counter

CASES = 400


def test_sizes_and_strides_of_operations_by_element_are_those_of_the_kernels() -> None:
    chance = random.Random(0)
    for _ in range(CASES):
        sizes = [chance.choice([1, 2, 3]) for _ in range(chance.randint(1, 5))]
        left, right = _permuted(chance, sizes), _permuted(chance, sizes)
        _same_layout(left - right, left.to("meta"), right.to("meta"))


def _same_layout(real: Tensor, left: Tensor, right: Tensor) -> None:
    with Counter():
        counted = left - right
    told = f"{left.shape} {left.stride()}, {right.shape} {right.stride()}"
    assert counted.shape == real.shape, told
    wide = [
        axis for axis, size in enumerate(real.shape) if size > 1
    ]  # the stride of a single place says nothing
    assert [counted.stride(axis) for axis in wide] == [real.stride(axis) for axis in wide], told


def test_sums_and_means_over_permuted_axes_leave_what_the_kernels_leave() -> None:
    chance = random.Random(1)
    for _ in range(CASES):
        tensor = _permuted(chance, [chance.choice([1, 2, 3]) for _ in range(chance.randint(1, 5))])
        axes = sorted(chance.sample(range(tensor.ndim), chance.randint(1, tensor.ndim)))
        keepdim = chance.random() < 0.5
        real = tensor.mean(axes, keepdim)
        with Counter():
            counted = tensor.to("meta").mean(axes, keepdim)
        wide = [axis for axis, size in enumerate(real.shape) if size > 1]
        assert counted.shape == real.shape, f"{tensor.shape} {tensor.stride()} {axes}"
        assert [counted.stride(axis) for axis in wide] == [real.stride(axis) for axis in wide], (
            f"{tensor.shape} {tensor.stride()} {axes}"
        )


def _permuted(chance: random.Random, sizes: Sequence[int]) -> Tensor:
    """Return a tensor of ``sizes``, some axes of length one, laid out in an order of its own."""
    sizes = [1 if chance.random() < 0.2 else size for size in sizes]
    order = list(range(len(sizes)))
    chance.shuffle(order)
    return torch.ones([sizes[axis] for axis in order]).permute(
        [order.index(axis) for axis in range(len(order))]
    )
