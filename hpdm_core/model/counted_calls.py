"""Counts FLOPs and kept memory of the calls of blocks and fusions, forward and backward.

Calls with the same kind and arguments of the same form (sizes, strides, dtype) cost the same. The first such call runs
under a `hpdm_core.model.counting.Counter` and is recorded; every later one adds the recorded counts.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any, TypeAlias, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from hpdm_core.model.backbone import Backbone
from hpdm_core.model.counting import Counter, Form, empty_of, form_of, owns_memory
from hpdm_core.model.execution import Execution
from hpdm_core.model.fusion import ContextFusion, Source
from hpdm_core.pyramid import Coords

__all__ = ["Calls", "CountedExecution", "CountedFusion", "KnownCalls"]


@dataclass(frozen=True)
class _Call:
    """The recorded costs of a call.

    ``forms``: of the outputs; ``rebuild``: puts the outputs into the structure that the call returns;
    ``differentiable``: whether each output takes part in the backward pass; ``flops``: of the forward pass. What the
    call keeps for the backward pass, besides weights: ``kept``, indices into its inputs followed by the module's
    buffers and tensor attributes; ``kept_outputs``, indices of outputs; ``kept_inside``, bytes of its own tensors.
    ``backward``: for each set of outputs that have a gradient, the operations, and which inputs get a gradient.
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
"""By kind of call and form of its tensors. None: its outputs share memory with other tensors, so it is always run."""


class Calls:
    """Runs each distinct call once under ``counter``; when it is repeated, only adds its recorded counts.

    ``known``: the recorded calls; ``setting``: what their counts depend on besides modules and arguments.
    """

    def __init__(self, counter: Counter, known: KnownCalls, setting: Hashable) -> None:
        self.counter = counter
        self.known = known
        self.setting = setting
        self._begun: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        """Inputs and outputs of recorded calls whose backward pass has not run yet."""

    def once(
        self, module: nn.Module, kind: Hashable, call: Callable[..., Any], *arguments: Any, keeps: bool = True
    ) -> Any:
        """Return what ``call(*arguments)`` returns, as meta tensors.

        ``kind``: a key that differs for calls of ``module`` that do different operations on the same arguments.
        ``keeps``: whether the memory that the call keeps for the backward pass is counted.
        """
        inputs: list[Tensor] = []
        plain, rebuild = _apart(arguments, inputs)
        storages = [each.untyped_storage()._cdata for each in inputs]
        forms = tuple((*form_of(each), each.requires_grad) for each in inputs)
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
        made = _Counted.apply(
            self, found, work, empty_of(((0,), (1,), torch.float32)).requires_grad_(), *inputs
        )  # type: ignore[no-untyped-call]
        if keeps:
            held = [*inputs, *_holdings(module)] if found.kept else []
            for each in (*map(held.__getitem__, found.kept), *map(made.__getitem__, found.kept_outputs)):
                self.counter.keep(each)
            self.counter.kept_inside += found.kept_inside
        return found.rebuild(iter(made))

    def _recorded(
        self, module: nn.Module, work: Callable[[Sequence[Tensor]], Any], inputs: Sequence[Tensor]
    ) -> _Call | None:
        """Run ``work`` and return its recorded costs; None if an output shares memory with another tensor."""
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
        if not all(each.is_meta and owns_memory(each, seen) for each in outputs):
            return None
        own = [each.untyped_storage()._cdata for each in outputs]
        inside = [tensor.untyped_storage() for each, tensor in kept.items() if each not in seen]
        found = _Call(
            forms=tuple(map(form_of, outputs)),
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
        """Count the backward pass, where ``given`` says which outputs have a gradient; return the inputs' gradients."""
        if given not in found.backward:
            before = self.counter.flops
            with torch.enable_grad():
                leaves, outputs = self._begun.pop(id(found), ([], []))
                if not outputs:
                    leaves = [empty_of(form).requires_grad_(asked) for form, asked in inputs]
                    _apart(work(leaves), outputs)
                # Backward of a sum: passing gradients to backward() would load a slow part of torch.
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
        return [empty_of(form) if has else None for (form, _), has in zip(inputs, reached, strict=True)]


class _Counted(torch.autograd.Function):
    """A recorded call as a node of the autograd graph; outputs and gradients are meta tensors."""

    @staticmethod
    def forward(
        ctx: Any, calls: Calls, found: _Call, work: Any, anchor: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """Return new outputs; ``anchor`` makes them differentiable when only the weights require a gradient."""
        ctx.set_materialize_grads(False)
        forms = [(form_of(each), each.requires_grad) for each in inputs]
        ctx.gradients = lambda given: calls.gradients(found, work, forms, given)
        made = tuple(map(empty_of, found.forms))
        fixed = (each for each, has in zip(made, found.differentiable, strict=True) if not has)
        ctx.mark_non_differentiable(*fixed)
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Return gradients for the inputs that get one."""
        return None, None, None, None, *ctx.gradients(tuple(each is not None for each in grads))


def _apart(value: Any, tensors: list[Tensor]) -> tuple[Hashable, Rebuild]:
    """Append the tensors in ``value`` to ``tensors``; return the rest of ``value`` as a hashable, and a function that
    rebuilds ``value`` with other tensors.
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
    """Return the tensors of a module besides its weights: buffers and plain attributes."""
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
    """Runs blocks through ``calls``; with ``checkpointing`` a block keeps only its inputs.

    ``kind``: a key of the backbone's configuration.
    """

    calls: Calls
    kind: Hashable

    def run(
        self, backbone: Backbone, block: int, tokens: Tensor, latents: Tensor | None, condition: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Run one block as `Execution.run` does, in float32."""
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
    """Runs `pixel_context` and `token_context` of ``fusion`` through ``calls``; ``kind``: a key of its options."""

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
