"""The keys of a cell's stages, worked out once for all seeds of an arm.

A study of thousands of cells has few arms: what a key depends on besides the seed (sections, parts, plugins' sources,
protocols, what lies at a path) is gathered and hashed once, and each seed adds its digits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hpdm_core.assembly.keys import (
    absent_in,
    data_key,
    evaluation_facts,
    places_in,
    sample_facts,
    train_facts,
)
from hpdm_core.base.canonical import canonical_json
from hpdm_core.base.errors import InputError
from hpdm_core.config.content import Known
from hpdm_core.config.schema import CellConfig, Part
from hpdm_core.plugins import Plugins

__all__ = ["ArmKeys", "Keys"]

HOLE = "\x00hole"
BASE = "\x00base"


@dataclass(frozen=True, kw_only=True)
class Keys:
    """The keys of a cell's stages; ``evaluations`` stand in the order of the configuration's metrics."""

    train: str
    samples: str
    evaluations: tuple[str, ...]

    @property
    def stages(self) -> list[tuple[str, str]]:
        """Kind and key of every stage."""
        evaluations = [("evaluations", key) for key in self.evaluations]
        return [("train", self.train), ("samples", self.samples), *evaluations]


class _Template:
    """The digest of canonical JSON in which ``holes`` are still to be filled in, given in the order of the text."""

    def __init__(self, facts: Mapping[str, Any], holes: Sequence[str] = (HOLE,)) -> None:
        text, parts = canonical_json(facts), []
        for hole in holes:
            before, text = text.split(json.dumps(hole))
            parts.append(before)
        self._head = hashlib.sha256(parts[0].encode())
        self._rest = [part.encode() for part in (*parts[1:], text)]

    def digest(self, *values: int | str) -> str:
        whole = self._head.copy()
        for value, part in zip(values, self._rest, strict=True):
            whole.update(json.dumps(value).encode() + part)
        return whole.hexdigest()


class ArmKeys:
    """What the cells share that differ from ``config`` in their seed alone. ``known``: see `hpdm_core.assembly.keys`;
    ``base``: of the model that they start from, if that is an arm's.
    """

    def __init__(
        self, config: CellConfig, plugins: Plugins, known: Known | None = None, *, base: ArmKeys | None = None
    ) -> None:
        self.config = config
        self.base = base
        self.plugins = plugins
        self._known = known

    def keys(self, seed: int) -> Keys:
        """Return the keys of the cell with ``seed``."""
        train = self.train_key(seed)
        samples = self._samples.digest(train)
        bases = {"configuration": samples, "training": train, "model": train, "samples": samples}
        made = tuple(
            template.digest(bases.get(need) or self._data)
            for need, template in zip(self.needs, self._evaluations, strict=True)
        )
        return Keys(train=train, samples=samples, evaluations=made)

    def train_key(self, seed: int) -> str:
        """Return the key of the trained weights with ``seed``."""
        return self._train.digest(seed, *([] if self.base is None else [self.base.train_key(seed)]))

    @cached_property
    def needs(self) -> tuple[str, ...]:
        """What each metric reads."""
        return tuple(metric.needs for _, metric in self._metrics)

    @cached_property
    def absent(self) -> list[str]:
        """A line per place that is taken by its content, where nothing lies or is known to have lain."""
        return [*(self.base.absent if self.base else ()), *absent_in(self.config, self.plugins, self._known)]

    @cached_property
    def contents(self) -> dict[str, str]:
        """Place -> fingerprint of all that the keys take by its content."""
        return places_in(self.config, self.plugins, self._known)

    @cached_property
    def _metrics(self) -> list[tuple[Part, Any]]:
        return [(part, self.plugins.make("metrics", part)) for part in self.config.evaluation.metrics]

    @cached_property
    def _train(self) -> _Template:
        facts = train_facts(self.config, self.plugins, self._known, base=None if self.base is None else BASE)
        return _Template({**facts, "seed": HOLE}, (HOLE,) if self.base is None else (HOLE, BASE))

    @cached_property
    def _samples(self) -> _Template:
        return _Template(sample_facts(HOLE, self.config, self.plugins, self._known))

    @cached_property
    def _evaluations(self) -> list[_Template]:
        return [
            _Template(evaluation_facts(HOLE, self._protocol(metric), part=part, plugins=self.plugins))
            for part, metric in self._metrics
        ]

    @cached_property
    def _data(self) -> str:
        from hpdm_core.metrics.interface import data_facts

        return data_key(data_facts(self.config, self.plugins, self._known), self.config, self.plugins)

    def _protocol(self, metric: Any) -> dict[str, Any]:
        from hpdm_core.assembly.assembly import Assembly

        seeds = (self.config.seed, self.config.seed + 1)
        found = [
            metric.protocol(Assembly(self.config.model_copy(update={"seed": seed}), self.plugins))
            for seed in seeds
        ]
        if found[0] != found[1]:
            raise InputError(
                f"metric {metric.name}: its protocol depends on the cell's seed; a protocol is the same for all seeds"
            )
        return {**found[0], "metric": metric.name}
