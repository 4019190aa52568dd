"""The keys of a cell's stages, computed once for all seeds of an arm.

A study of thousands of cells has few arms. So everything besides the seed on which a key depends (sections, parts,
plugins' sources, protocols, content of paths) is collected and hashed once; then the seed is inserted for each cell.
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
    """The keys of a cell's stages; ``evaluations`` are in the order of the configuration's metrics."""

    train: str
    samples: str
    evaluations: tuple[str, ...]

    @property
    def stages(self) -> list[tuple[str, str]]:
        """Kind and key of every stage."""
        evaluations = [("evaluations", key) for key in self.evaluations]
        return [("train", self.train), ("samples", self.samples), *evaluations]


class _Template:
    """SHA-256 of canonical JSON with placeholders (``holes``, in the order of the text) that `digest` fills in."""

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
    """Computes the keys of all cells that differ from ``config`` in the seed only.

    ``known``: see `hpdm_core.assembly.keys`; ``base``: the keys of the arm from whose model they start, if any.
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
        """The `needs` of each metric, in the order of the configuration."""
        return tuple(metric.needs for _, metric in self._metrics)

    @cached_property
    def absent(self) -> list[str]:
        """A line for each path that enters a key by its content and neither exists nor has a known fingerprint."""
        return [*(self.base.absent if self.base else ()), *absent_in(self.config, self.plugins, self._known)]

    @cached_property
    def contents(self) -> dict[str, str]:
        """Path -> fingerprint, for each path that enters a key by its content."""
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
                f"metric {metric.name}: its protocol depends on the cell's seed; it must be the same for all seeds"
            )
        return {**found[0], "metric": metric.name}
