"""Counts what code would compute and keep, without computing it: on the meta device, each operation and each block of
a network worked out once.

Real code runs, with real autograd; `Counter` stands between it and the kernels of the meta device. Those work out
shapes in Python, most of them through torch's compiler, which alone takes two seconds to load. So what an operation
gives is remembered by its arguments' shapes, and the commonest ones go by the rules below, which say what the
kernels say. `Calls` remembers whole blocks, and what fusions make of parents, in the same way: forward and backward.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from hpdm_core.model.backbone import Backbone
from hpdm_core.model.execution import Execution
from hpdm_core.model.fusion import ContextFusion, Source
from hpdm_core.pyramid import Coords

__all__ = ["Calls", "CountedExecution", "CountedFusion", "Counter", "KnownCalls"]

aten = torch.ops.aten
META = torch.device("meta")
Form: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Sizes, strides and type of a tensor on the meta device."""


def _form(tensor: Tensor) -> Form:
    return tensor.shape, tensor.stride(), tensor.dtype


def _maker(form: Form) -> Callable[[], Tensor]:
    sizes, strides, dtype = form
    return partial(torch.empty_strided, sizes, strides, dtype=dtype, device=META)


def _made(form: Form) -> Tensor:
    return _maker(form)()


# Operations


_operations: dict[Hashable, tuple[int, Callable[[], Any]]] = {}
"""By operation and arguments, what was worked out in this process: floating-point operations, and what makes the
result.
"""
Kind: TypeAlias = Literal["composite", "in place", "pure", "other"]
"""Made of other operations; changing the numbers of its first argument, element by element, and giving it back, which
on the meta device has none; reading its arguments, making new tensors and doing nothing else; anything else."""
_kinds: dict[int, Kind] = {}


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within the block ``flops`` counts the floating-point operations of matrix products and convolutions (a
    multiply and an add are two) as `torch.utils.flop_counter` does, and `keep` the memory that is kept.

    Operations on tensors of other devices than meta run as ever.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.kept_inside = 0
        """Bytes that blocks keep of their own."""
        self._kept: dict[int, torch.UntypedStorage] = {}  # by identity: views share a storage

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise the compiler is loaded, to be told to leave this mode alone

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        kind = _kinds.get(id(func))  # there is one object for each operation, and its own hash is slow
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
        """Note that ``tensor`` is kept, and return it. A storage counts once."""
        storage = tensor.untyped_storage()
        self._kept[storage._cdata] = storage
        return tensor

    def kept_bytes(self, *, besides: Iterable[Tensor]) -> int:
        """Return the bytes of all that is kept, the storages of ``besides`` aside."""
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
    """Return what the result depends on, or None where there is more to it than shapes."""
    key: list[Hashable] = [id(func)]
    if _known(args, key) and (not kwargs or _known(kwargs.items(), key)):
        return tuple(key)
    return None


def _known(values: Iterable[Any], key: list[Hashable]) -> bool:
    """Add ``values`` to ``key``; return whether they are all there is to know."""
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
            key += [cast(Hashable, kind), value]  # 1 and 1.0 are equal, and do not give the same
    return True


def _making(result: Any, args: Sequence[Any]) -> Callable[[], Any] | None:
    """Return what makes tensors as in ``result``, or None where one has no memory of its own."""
    alone = isinstance(result, Tensor)
    results = (result,) if alone else result
    if not isinstance(results, tuple) or not all(
        each is None or isinstance(each, Tensor) for each in results
    ):
        return None
    seen = {tensor.untyped_storage()._cdata for tensor in args if isinstance(tensor, Tensor)}
    if not all(each is None or (each.is_meta and _own(each, seen)) for each in results):
        return None
    makers = [None if each is None else _maker(_form(each)) for each in results]
    if alone:
        return makers[0]
    return lambda: tuple(None if make is None else make() for make in makers)


def _own(tensor: Tensor, seen: set[int]) -> bool:
    """Whether ``tensor`` fills a storage that is not among ``seen``, to which it is added."""
    storage = tensor.untyped_storage()
    new = storage._cdata not in seen
    seen.add(storage._cdata)
    return new and storage.nbytes() == _made(_form(tensor)).untyped_storage().nbytes()


# Rules: they give what the kernels of the meta device give, or None where they do not know


def _by_rule(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    rule = _RULES.get(func)
    if rule is None and torch.Tag.pointwise in func.tags:
        return _pointwise(func, args, kwargs)
    return None if rule is None else rule(*args, **kwargs)


def _pointwise(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """Sizes by broadcasting, strides as a tensor iterator chooses them, the type by the operation itself on
    nothing.
    """
    given = [each for each in args if isinstance(each, Tensor)]
    if not given or "memory_format" in kwargs or any(isinstance(each, Tensor) for each in kwargs.values()):
        return None
    sizes = _broadcast([each.shape for each in given])
    whole = [each for each in given if each.numel() > 1]
    if all(_in_order(each) for each in whole):
        strides = _row_major(sizes)
    elif all(each.shape == sizes and each.stride() == whole[0].stride() for each in whole) and _dense(
        whole[0]
    ):
        strides = whole[0].stride()
    else:
        return None
    nothing = [
        torch.ones((0,) * each.ndim, dtype=each.dtype, device="cpu") if isinstance(each, Tensor) else each
        for each in args
    ]
    made = func(*nothing, **kwargs)
    return _made((sizes, strides, made.dtype)) if isinstance(made, Tensor) else None


def _broadcast(shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the sizes that ``shapes``, which fit together, are broadcast to."""
    axes = itertools.zip_longest(*(reversed(each) for each in shapes), fillvalue=1)
    return tuple(next((size for size in axis if size != 1), 1) for axis in axes)[::-1]


def _in_order(tensor: Tensor) -> bool:
    """Whether no axis has to be moved for strides to fall; broadcast axes fit anywhere."""
    last = math.inf
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if size > 1 and stride > 0:
            if stride >= last:
                return False
            last = stride
    return True


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory, each place once."""
    filled = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != filled:
                return False
            filled *= size
    return True


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
        return None  # channels may lie last
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
    if not tensor.is_floating_point() or dtype not in (None, tensor.dtype) or not _in_order(tensor):
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


# Calls of parts


@dataclass(frozen=True)
class _Call:
    """What a call does with tensors of one form.

    ``flops`` forward; the outputs have ``forms``, stand where ``rebuild`` puts them, and take part in a backward pass
    where ``differentiable``. Besides weights the call keeps the tensors number ``kept`` of its inputs and of what the
    module holds, ``kept_outputs`` of its outputs, and ``kept_inside`` bytes. ``backward``: for each set of outputs
    that have a gradient, the operations, and which inputs get one.
    """

    forms: tuple[Form, ...]
    rebuild: Rebuild
    differentiable: tuple[bool, ...]
    flops: int
    kept: tuple[int, ...]
    kept_outputs: tuple[int, ...]
    kept_inside: int
    backward: dict[tuple[bool, ...], tuple[int, tuple[bool, ...]]] = field(default_factory=dict)


Rebuild: TypeAlias = Callable[[Iterator[Tensor]], Any]
KnownCalls: TypeAlias = dict[Hashable, _Call | None]
"""By kind of call and form of its tensors; None for one that hands on memory of others, and is made every time."""


class Calls:
    """Makes each distinct call once under ``counter``, and counts it again each time that it is asked for.

    ``known``: the calls that were made; ``setting``: what they depend on besides modules and arguments.
    """

    def __init__(self, counter: Counter, known: KnownCalls, setting: Hashable) -> None:
        self.counter = counter
        self.known = known
        self.setting = setting
        self._begun: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        """Inputs and outputs of calls that were recorded and had no backward pass yet."""

    def once(
        self, module: nn.Module, kind: Hashable, call: Callable[..., Any], *arguments: Any, keeps: bool = True
    ) -> Any:
        """Return what ``call(*arguments)`` returns, tensors without contents.

        ``kind``: what tells it, a call of ``module``, from calls that do something else with such arguments.
        ``keeps``: whether what it keeps for a backward pass is counted.
        """
        inputs: list[Tensor] = []
        plain, rebuild = _apart(arguments, inputs)
        storages = [each.untyped_storage()._cdata for each in inputs]
        forms = tuple((*_form(each), each.requires_grad) for each in inputs)
        shared = tuple(map(storages.index, storages))
        key = (self.setting, kind, torch.is_grad_enabled(), plain, forms, shared)

        def work(tensors: Sequence[Tensor]) -> Any:
            return call(*rebuild(iter(tensors)))

        if key not in self.known:
            self.known[key] = self._recorded(module, work, inputs)
        found = self.known[key]
        if found is None:
            return call(*arguments)
        self.counter.flops += found.flops
        made = _Counted.apply(self, found, work, _made(((0,), (1,), torch.float32)).requires_grad_(), *inputs)  # type: ignore[no-untyped-call]
        if keeps:
            held = [*inputs, *_holdings(module)] if found.kept else []
            for each in (*map(held.__getitem__, found.kept), *map(made.__getitem__, found.kept_outputs)):
                self.counter.keep(each)
            self.counter.kept_inside += found.kept_inside
        return found.rebuild(iter(made))

    def _recorded(
        self, module: nn.Module, work: Callable[[Sequence[Tensor]], Any], inputs: Sequence[Tensor]
    ) -> _Call | None:
        """Do ``work`` and return what it does."""
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        before = self.counter.flops
        leaves = [each.detach().requires_grad_(each.requires_grad) for each in inputs]
        outputs: list[Tensor] = []
        with saved_tensors_hooks(keep, _same):
            _, rebuild = _apart(work(leaves), outputs)
        flops, self.counter.flops = self.counter.flops - before, before
        held = [each.untyped_storage()._cdata for each in (*inputs, *_holdings(module))]
        seen = {*held, *_weights(module)}
        if not all(each.is_meta and _own(each, seen) for each in outputs):
            return None
        own = [each.untyped_storage()._cdata for each in outputs]
        inside = [tensor.untyped_storage() for each, tensor in kept.items() if each not in seen]
        found = _Call(
            forms=tuple(map(_form, outputs)),
            rebuild=rebuild,
            differentiable=tuple(each.requires_grad for each in outputs),
            flops=flops,
            kept=tuple(held.index(each) for each in kept if each in held),
            kept_outputs=tuple(own.index(each) for each in kept if each in own),
            kept_inside=sum(storage.nbytes() for storage in inside),
        )
        self._begun[id(found)] = leaves, outputs
        return found

    def gradients(
        self,
        found: _Call,
        work: Callable[[Sequence[Tensor]], Any],
        inputs: Sequence[tuple[Form, bool]],
        given: tuple[bool, ...],
    ) -> list[Tensor | None]:
        """Count the backward pass from the outputs that are ``given`` a gradient, and return the inputs' own."""
        if given not in found.backward:
            before = self.counter.flops
            with torch.enable_grad():
                leaves, outputs = self._begun.pop(id(found), ([], []))
                if not outputs:
                    leaves = [_made(form).requires_grad_(asked) for form, asked in inputs]
                    _apart(work(leaves), outputs)
                # Of a sum: gradients that are handed over are looked at by a part of torch that is slow to load.
                total = torch.stack(
                    [each.sum() for each, has in zip(outputs, given, strict=True) if has]
                ).sum()
                start = self.counter.flops
                total.backward()  # type: ignore[no-untyped-call]
            found.backward[given] = (
                self.counter.flops - start,
                tuple(each.grad is not None for each in leaves),
            )
            self.counter.flops = before
        flops, reached = found.backward[given]
        self.counter.flops += flops
        return [_made(form) if has else None for (form, _), has in zip(inputs, reached, strict=True)]


class _Counted(torch.autograd.Function):
    """A known call: outputs and gradients without contents, and its place in the graph of autograd."""

    @staticmethod
    def forward(
        ctx: Any, calls: Calls, found: _Call, work: Any, anchor: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """Return new outputs; ``anchor`` makes them differentiable where only weights are."""
        ctx.set_materialize_grads(False)
        forms = [(_form(each), each.requires_grad) for each in inputs]
        ctx.gradients = lambda given: calls.gradients(found, work, forms, given)
        made = tuple(map(_made, found.forms))
        fixed = (each for each, has in zip(made, found.differentiable, strict=True) if not has)
        ctx.mark_non_differentiable(*fixed)
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Return gradients for the inputs that get one."""
        return None, None, None, None, *ctx.gradients(tuple(each is not None for each in grads))


def _apart(value: Any, tensors: list[Tensor]) -> tuple[Hashable, Rebuild]:
    """Add the tensors in ``value`` to ``tensors``; return what there is besides, and what puts others in their
    place.
    """
    if isinstance(value, Tensor):
        tensors.append(value)
        return Tensor, next
    if isinstance(value, (list, tuple)):
        parts = [_apart(each, tensors) for each in value]
        return tuple(plain for plain, _ in parts), lambda others: type(value)(
            [put(others) for _, put in parts]
        )
    if is_dataclass(value) and not isinstance(value, type):
        named = {each.name: _apart(getattr(value, each.name), tensors) for each in fields(value)}
        besides = (type(value), *(plain for plain, _ in named.values()))
        return besides, lambda others: type(value)(**{name: put(others) for name, (_, put) in named.items()})
    return (type(value), value), lambda others: value


_held: WeakKeyDictionary[nn.Module, list[Tensor]] = WeakKeyDictionary()
_weighed: WeakKeyDictionary[nn.Module, list[int]] = WeakKeyDictionary()


def _holdings(module: nn.Module) -> list[Tensor]:
    """Return the tensors that a module holds besides its weights: buffers and plain attributes."""
    if module not in _held:
        own = (vars(each).values() for each in module.modules())
        plain = [each for values in own for each in values if isinstance(each, Tensor)]
        _held[module] = [*module.buffers(), *plain]
    return _held[module]


def _weights(module: nn.Module) -> list[int]:
    """Return the storages of a module's weights."""
    if module not in _weighed:
        _weighed[module] = [each.untyped_storage()._cdata for each in module.parameters()]
    return _weighed[module]


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _dropped(tensor: Tensor) -> None:
    return None


def _never(packed: None) -> Tensor:
    raise AssertionError("what a checkpointed block would keep was asked for")


@dataclass(frozen=True, kw_only=True)
class CountedExecution(Execution):
    """Makes the calls of blocks by ``calls``; with ``checkpointing`` a block keeps its inputs alone.

    ``kind``: what the backbone was made of.
    """

    calls: Calls
    kind: Hashable

    def run(
        self, backbone: Backbone, block: int, tokens: Tensor, latents: Tensor | None, condition: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Do as `Execution.run` does, in float32."""
        once = partial(
            self.calls.once, backbone, (self.kind, backbone.kind(block)), partial(backbone.run, block)
        )
        if not (self.checkpointing and torch.is_grad_enabled()):
            return cast("tuple[Tensor, Tensor | None]", once(tokens, latents, condition))
        for each in (tokens, latents, condition):
            if each is not None:
                self.calls.counter.keep(each)
        with saved_tensors_hooks(_dropped, _never):
            return cast("tuple[Tensor, Tensor | None]", once(tokens, latents, condition, keeps=False))


class CountedFusion(ContextFusion):
    """Makes the calls of ``fusion`` that depend on the parents by ``calls``; ``kind``: what it was made of."""

    def __init__(self, fusion: ContextFusion, calls: Calls, kind: Hashable) -> None:
        super().__init__()
        self.fusion = fusion
        self.calls = calls
        self.kind_of_all = kind
        self.extra_channels = fusion.extra_channels
        self.reads_tokens = fusion.reads_tokens

    def pixel_context(self, level: int, coords: Coords, sources: Sequence[Source]) -> Tensor | None:
        """See `ContextFusion`."""
        kind = (self.kind_of_all, "pixel_context")
        made: Tensor | None = self.calls.once(
            self.fusion, kind, self.fusion.pixel_context, level, coords, list(sources)
        )
        return made

    def token_context(
        self, block: int, level: int, coords: Coords, sources: Sequence[Source]
    ) -> Tensor | None:
        """See `ContextFusion`."""
        kind = (self.kind_of_all, "token_context", self.fusion.kind(block))
        call = partial(self.fusion.token_context, block)
        made: Tensor | None = self.calls.once(self.fusion, kind, call, level, coords, list(sources))
        return made

    def fuse(
        self, block: int, level: int, tokens: Tensor, context: Tensor | None, coords: Coords, sigma: Tensor
    ) -> Tensor:
        """See `ContextFusion`."""
        return self.fusion.fuse(block, level, tokens, context, coords, sigma)
