"""Contract of optimizers."""

from __future__ import annotations

import io
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hpdm_core.base.randomness import generator
from hpdm_core.testing.case import Case, expect

__all__ = ["OptimizerCases"]


class _Quadratic(nn.Module):
    """A small problem with a matrix, a bias and a norm's gain, because optimizers treat these differently."""

    def __init__(self) -> None:
        super().__init__()
        stream = generator(0, "conformance", "quadratic")
        self.layer = nn.Linear(5, 3)
        self.norm = nn.LayerNorm(3)
        self.unused = nn.Parameter(torch.ones(2))
        with torch.no_grad():
            for parameter in (self.layer.weight, self.layer.bias):
                parameter.copy_(torch.randn(parameter.shape, generator=stream))
        self.wanted = [torch.randn(each.shape, generator=stream) for each in self._fitted()]

    def _fitted(self) -> list[nn.Parameter]:
        return [*self.layer.parameters(), *self.norm.parameters()]

    def loss(self) -> Tensor:
        terms = [
            (each - wanted).square().sum() for each, wanted in zip(self._fitted(), self.wanted, strict=True)
        ]
        return torch.stack(terms).sum()


class OptimizerCases(Case):
    """``factory(named_parameters, lr, *, ...) -> torch.optim.Optimizer``."""

    family: ClassVar[str] = "optimizers"
    learning_rate = 0.01
    steps = 100

    def _start(self) -> tuple[_Quadratic, torch.optim.Optimizer]:
        problem = _Quadratic()
        optimizer: torch.optim.Optimizer = self.make(problem.named_parameters(), self.learning_rate)
        return problem, optimizer

    @staticmethod
    def _steps(problem: _Quadratic, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            problem.loss().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()

    @staticmethod
    def _differing(one: nn.Module, other: nn.Module) -> list[str]:
        others = dict(other.named_parameters())
        return [name for name, each in one.named_parameters() if not torch.equal(each, others[name])]

    def test_reduces_a_quadratic(self) -> None:
        """The loss of a quadratic falls below 80% in 100 steps, and every parameter with a gradient changes."""
        problem, optimizer = self._start()
        before = problem.loss().item()
        self._steps(problem, optimizer, self.steps)
        after = problem.loss().item()
        expect(
            after < 0.8 * before,
            f"the loss of a quadratic goes from {before:.4g} to {after:.4g} in {self.steps} steps",
        )
        still = [name for name in self._differing_not(problem, _Quadratic()) if name != "unused"]
        expect(not still, f"parameters that never move: {', '.join(still)}")

    def test_learning_rate_is_read_from_the_groups(self) -> None:
        """The optimizer uses ``group["lr"]``, which the schedule sets; at 0 no parameter changes."""
        problem, optimizer = self._start()
        self._steps(problem, optimizer, 2)
        for group in optimizer.param_groups:
            given = group.get("lr")
            expect(given == self.learning_rate, f"param_groups: lr is {given}, wanted {self.learning_rate}")
            group["lr"] = 0.0
        before = _Quadratic()
        before.load_state_dict(problem.state_dict())
        self._steps(problem, optimizer, 1)
        moved = self._differing(problem, before)
        expect(not moved, f"at learning rate 0 these move: {', '.join(moved)}")

    def test_state_dict_round_trip(self) -> None:
        """A run that is saved, loaded (weights_only=True) and continued is bitwise equal to an uninterrupted one."""
        whole, optimizer = self._start()
        self._steps(whole, optimizer, 6)

        first, optimizer = self._start()
        self._steps(first, optimizer, 3)
        file = io.BytesIO()
        torch.save({"weights": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved: dict[str, Any] = torch.load(file, weights_only=True)
        second, optimizer = self._start()
        second.load_state_dict(saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
        self._steps(second, optimizer, 3)
        moved = self._differing(whole, second)
        expect(not moved, f"continued from its state dict, these differ: {', '.join(moved)}")

    def test_deterministic(self) -> None:
        """Two runs from the same start are bitwise equal."""
        (one, first), (other, second) = self._start(), self._start()
        self._steps(one, first, 5)
        self._steps(other, second, 5)
        moved = self._differing(one, other)
        expect(not moved, f"two equal runs differ in: {', '.join(moved)}")

    @classmethod
    def _differing_not(cls, one: nn.Module, other: nn.Module) -> list[str]:
        changed = cls._differing(one, other)
        return [name for name, _ in one.named_parameters() if name not in changed]
