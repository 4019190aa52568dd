"""Counts the FLOPs and the kept memory of code by running it on the meta device, without computing values.

The real code runs, with real autograd; `Counter` intercepts its operations before the meta kernels. Most meta kernels
infer shapes in Python through torch's compiler, which takes two seconds to load. Therefore `Counter` caches the result
of each operation by its arguments' shapes, and infers the most common ones by the rules below, which give the same
results as the kernels. `hpdm_core.model.counted_calls` caches whole blocks in the same way.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ["Counter", "Form", "empty_of", "form_of", "owns_memory"]

aten = torch.ops.aten
META = torch.device("meta")
Form: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Sizes, strides and type of a tensor on the meta device."""


def form_of(tensor: Tensor) -> Form:
    """Return sizes, strides and type of ``tensor``."""
    return tensor.shape, tensor.stride(), tensor.dtype


def _maker(form: Form) -> Callable[[], Tensor]:
    sizes, strides, dtype = form
    return partial(torch.empty_strided, sizes, strides, dtype=dtype, device=META)


def empty_of(form: Form) -> Tensor:
    """Return a new tensor of ``form`` on the meta device."""
    return _maker(form)()


# Operations


_operations: dict[Hashable, tuple[int, Callable[[], Any]]] = {}
"""The cache of this process, by operation and arguments: FLOPs, and a function that makes the result."""
Kind: TypeAlias = Literal["composite", "in place", "pure", "other"]
"""Kinds of operations. "composite": consists of other operations. "in place": element-wise change of its first
argument, which it returns (nothing to do on the meta device). "pure": makes new tensors from its arguments and has no
other effect. "other": anything else."""
_kinds: dict[int, Kind] = {}


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within the block, ``flops`` counts the floating-point operations of matrix products and convolutions (a
    multiply and an add are two), as `torch.utils.flop_counter` does; `keep` records the memory that is kept.

    Operations on tensors of other devices than meta run as usual.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.kept_inside = 0
        """Bytes that blocks keep besides inputs, outputs and weights."""
        self._kept: dict[int, torch.UntypedStorage] = {}  # by identity: views share a storage

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise torch loads its compiler only to exclude this mode from compilation

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        kind = _kinds.get(id(func))  # each operation is one object; hashing the object itself is slow
        if kind is None:
            kind = _kinds[id(func)] = _kind(func)
        if kind == "composite":
            with self:
                return func.decompose(*args, **kwargs)
        if kind == "in place" and args[0].is_meta:
            return args[0]
        key = _key(func, args, kwargs) if kind == "pure" else None
        if key is not None and (known := _operations.get(key)) is not None:
            self.flops += known[0]
            return known[1]()
        result = None if key is None else _by_rule(func, args, kwargs)
        if result is None:
            result = func(*args, **kwargs)
        formula = flop_registry.get(getattr(func, "_overloadpacket", func))
        flops = 0 if formula is None else int(formula(*args, **kwargs, out_val=result))
        self.flops += flops
        if key is not None and (make := _making(result, args)) is not None:
            _operations[key] = (flops, make)
        return result

    def keep(self, tensor: Tensor) -> Tensor:
        """Record that ``tensor`` is kept, and return it. A storage counts once."""
        storage = tensor.untyped_storage()
        self._kept[storage._cdata] = storage
        return tensor

    def kept_bytes(self, *, besides: Iterable[Tensor]) -> int:
        """Return the bytes of all kept storages, without those of ``besides``."""
        others = {tensor.untyped_storage()._cdata for tensor in besides}
        kept = sum(storage.nbytes() for each, storage in self._kept.items() if each not in others)
        return kept + self.kept_inside


def _kind(func: Any) -> Kind:
    if not isinstance(func, torch._ops.OpOverload):
        return "other"
    if func._can_decompose():
        return "composite"
    if torch.Tag.pointwise in func.tags and func._schema.name.endswith("_"):
        return "in place"
    schema = func._schema
    pure = all(each.alias_info is None for each in (*schema.arguments, *schema.returns))
    return "pure" if pure else "other"


def _key(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Hashable | None:
    """Return a key of all that the result depends on, or None if it depends on more than shapes and plain values."""
    key: list[Hashable] = [id(func)]
    if _known(args, key) and (not kwargs or _known(kwargs.items(), key)):
        return tuple(key)
    return None


def _known(values: Iterable[Any], key: list[Hashable]) -> bool:
    """Add ``values`` to ``key``; return whether the key then describes them fully."""
    for value in values:
        kind = type(value)
        if kind is Tensor or kind is torch.nn.Parameter:
            if not value.is_meta:
                return False
            key += (value.shape, value.stride(), value.dtype)
        elif kind is list or kind is tuple:
            key.append(len(value))
            if not _known(value, key):
                return False
        elif isinstance(value, Tensor):
            return False
        else:
            key += [cast(Hashable, kind), value]  # with its type: 1 == 1.0, but their results differ
    return True


def _making(result: Any, args: Sequence[Any]) -> Callable[[], Any] | None:
    """Return a function that makes tensors as in ``result``; None if one of them shares memory with another tensor."""
    alone = isinstance(result, Tensor)
    results = (result,) if alone else result
    if not isinstance(results, tuple) or not all(
        each is None or isinstance(each, Tensor) for each in results
    ):
        return None
    seen = {tensor.untyped_storage()._cdata for tensor in args if isinstance(tensor, Tensor)}
    if not all(each is None or (each.is_meta and owns_memory(each, seen)) for each in results):
        return None
    makers = [None if each is None else _maker(form_of(each)) for each in results]
    if alone:
        return makers[0]
    return lambda: tuple(None if make is None else make() for make in makers)


def owns_memory(tensor: Tensor, seen: set[int]) -> bool:
    """Whether ``tensor`` fills a storage that is not in ``seen``. Adds the storage to ``seen``."""
    storage = tensor.untyped_storage()
    new = storage._cdata not in seen
    seen.add(storage._cdata)
    return new and storage.nbytes() == empty_of(form_of(tensor)).untyped_storage().nbytes()


# Rules: they return the same as the meta kernels, or None for cases that they do not cover


def _by_rule(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    rule = _RULES.get(func)
    if rule is None and torch.Tag.pointwise in func.tags:
        return _pointwise(func, args, kwargs)
    return None if rule is None else rule(*args, **kwargs)


def _pointwise(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """Infer sizes by broadcasting, strides as TensorIterator does, the dtype by running it on no elements."""
    given = [each for each in args if isinstance(each, Tensor)]
    if not given or "memory_format" in kwargs or any(isinstance(each, Tensor) for each in kwargs.values()):
        return None
    sizes = _broadcast([each.shape for each in given])
    alike = all(each.shape == sizes for each in given)
    if alike and all(each.is_contiguous() for each in given):
        strides = _row_major(sizes)
    elif alike and all(each.stride() == given[0].stride() for each in given) and _dense(given[0]):
        strides = given[0].stride()
    else:
        strides = _strides_of_all(sizes, given)
    nothing = [
        torch.ones((0,) * each.ndim, dtype=each.dtype, device="cpu") if isinstance(each, Tensor) else each
        for each in args
    ]
    made = func(*nothing, **kwargs)
    return empty_of((sizes, strides, made.dtype)) if isinstance(made, Tensor) else None


def _broadcast(shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the sizes that the compatible ``shapes`` broadcast to."""
    axes = itertools.zip_longest(*(reversed(each) for each in shapes), fillvalue=1)
    return tuple(next((size for size in axis if size != 1), 1) for axis in axes)[::-1]


def _in_order(tensor: Tensor) -> bool:
    """Whether strides decrease from the first axis to the last; broadcast axes are ignored."""
    last = math.inf
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if size > 1 and stride > 0:
            if stride >= last:
                return False
            last = stride
    return True


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps."""
    filled = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != filled:
                return False
            filled *= size
    return True


def _strides_of_all(sizes: Sequence[int], given: Sequence[Tensor]) -> tuple[int, ...]:
    """Return the strides of a dense result of ``sizes`` for operands with different layouts.

    Two axes are ordered as in the first operand that orders them (`TensorIterator`, `reorder_dimensions`).
    """
    wide = [each.expand(sizes) for each in given]

    def compare(left: int, right: int) -> int:
        """Return 1 if ``left`` must lie further out than ``right``, -1 if further in, 0 if no operand orders them."""
        for each in wide:
            one, other = each.stride(left), each.stride(right)
            if 0 in (one, other):
                continue  # a broadcast axis does not order
            if one != other:
                return 1 if one > other else -1
            if sizes[left] > sizes[right]:
                return 1
        return 0

    inside_first = list(reversed(range(len(sizes))))
    for at in range(1, len(sizes)):
        moving = at
        for before in reversed(range(at)):
            order = compare(inside_first[before], inside_first[moving])
            if order > 0:
                inside_first[before], inside_first[moving] = inside_first[moving], inside_first[before]
                moving = before
            elif order < 0:
                break
    strides, step = [0] * len(sizes), 1
    for axis in inside_first:
        strides[axis] = step
        step *= sizes[axis]
    return tuple(strides)


def _row_major(sizes: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(sizes):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _rows(sizes: Sequence[int], like: Tensor) -> Tensor:
    return torch.empty(sizes, dtype=like.dtype, device="meta")


def _addmm(bias: Tensor, left: Tensor, right: Tensor, **factors: Any) -> Tensor | None:
    if not bias.dtype == left.dtype == right.dtype:
        return None
    return _rows((left.shape[0], right.shape[1]), left)


def _arange(*limits: Any, **kwargs: Any) -> Tensor:
    made = aten.arange(*limits, **{**kwargs, "device": "cpu"})
    return _rows(made.shape, made)


def _softmax(rows: Tensor, axis: int, dtype: torch.dtype | None = None) -> Tensor | None:
    return _rows(rows.shape, rows) if dtype in (None, rows.dtype) and _in_order(rows) else None


def _softmax_backward(grad: Tensor, rows: Tensor, axis: int, dtype: torch.dtype) -> Tensor | None:
    return _softmax(rows, axis) if _in_order(grad) and grad.dtype == rows.dtype == dtype else None


def _layer_norm(
    rows: Tensor, shape: Sequence[int], gain: Tensor | None, bias: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    if rows.dtype != torch.float32 or not _in_order(rows):
        return None
    whole = rows.ndim - len(shape)
    statistics = (*rows.shape[:whole], *(1,) * len(shape))
    return _rows(rows.shape, rows), _rows(statistics, rows), _rows(statistics, rows)


def _layer_norm_backward(
    grad: Tensor,
    rows: Tensor,
    shape: Sequence[int],
    mean: Tensor,
    deviation: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...] | None:
    if rows.dtype != torch.float32 or not (_in_order(grad) and _in_order(rows)):
        return None
    sizes = (rows.shape, tuple(shape), tuple(shape))
    return tuple(_rows(each, rows) if asked else None for each, asked in zip(sizes, wanted, strict=True))


def _cat(tensors: Sequence[Tensor], axis: int = 0) -> Tensor | None:
    first = tensors[0]
    axis %= max(first.ndim, 1)
    rest = {(*each.shape[:axis], *each.shape[axis + 1 :], each.dtype) for each in tensors}
    if len(rest) > 1 or first.ndim == 0:
        return None
    if first.ndim in (4, 5) and all(0 < each.stride()[1] <= each.stride()[-1] for each in tensors):
        return None  # the memory format may be channels-last
    length = sum(each.shape[axis] for each in tensors)
    return _rows((*first.shape[:axis], length, *first.shape[axis + 1 :]), first)


def _like(tensor: Tensor, *, dtype: torch.dtype | None = None, **others: Any) -> Tensor | None:
    if others.get("memory_format") not in (None, torch.preserve_format) or not _in_order(tensor):
        return None
    return torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=others.get("device") or "meta")


def _stack(tensors: Sequence[Tensor], axis: int = 0) -> Tensor | None:
    axis %= tensors[0].ndim + 1
    if axis == tensors[0].ndim:
        return _cat([each.unsqueeze(axis) for each in tensors], axis)
    if (joined := _cat(tensors, axis)) is None:
        return None
    return _rows((*joined.shape[:axis], len(tensors), *tensors[0].shape[axis:]), joined)


def _products(left: Tensor, right: Tensor) -> Tensor | None:
    return _rows((*left.shape[:-1], right.shape[-1]), left) if left.dtype == right.dtype else None


def _index(tensor: Tensor, indices: Sequence[Tensor | None]) -> Tensor | None:
    first, *others = indices
    if others or first is None or first.ndim != 1 or first.dtype != torch.int64 or not _in_order(tensor):
        return None
    return _rows((len(first), *tensor.shape[1:]), tensor)


def _index_select(tensor: Tensor, axis: int, index: Tensor) -> Tensor | None:
    axis %= max(tensor.ndim, 1)
    if index.ndim != 1 or not _in_order(tensor):
        return None
    return _rows((*tensor.shape[:axis], len(index), *tensor.shape[axis + 1 :]), tensor)


def _written(tensor: Tensor, *others: Any, **more: Any) -> Tensor | None:
    return _like(tensor)


def _widened(grad: Tensor, sizes: Sequence[int], *place: Any) -> Tensor:
    return _rows(sizes, grad)


def _sum(
    tensor: Tensor,
    axes: Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor | None:
    if not tensor.is_floating_point() or dtype not in (None, tensor.dtype):
        return None
    gone = {axis % tensor.ndim for axis in axes} if axes and tensor.ndim else set(range(tensor.ndim))
    sizes = [1 if axis in gone else size for axis, size in enumerate(tensor.shape)]
    return _rows([size for axis, size in enumerate(sizes) if keepdim or axis not in gone], tensor)


_RULES: dict[Any, Callable[..., Any]] = {
    aten.addmm.default: _addmm,
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    aten._safe_softmax.default: _softmax,
    aten._softmax_backward_data.default: _softmax_backward,
    aten.mm.default: _products,
    aten.bmm.default: _products,
    aten.mean.dim: _sum,
    aten.sum.dim_IntList: _sum,
    aten.sum.default: _sum,
    aten.index.Tensor: _index,
    aten.index_select.default: _index_select,
    aten.index_add.default: _written,
    aten.index_copy.default: _written,
    aten.index_put.default: _written,
    aten.select_backward.default: _widened,
    aten.slice_backward.default: _widened,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.empty_like.default: _like,
    aten.ones_like.default: _like,
    aten.zeros_like.default: _like,
}
