"""Conformance cases: the contract of every family of parts as runnable checks, for authors of plugins.

There is one class per family. With pytest, subclass it and set the part under test:

    from hpdm_core.testing import ContextFusionCases

    class TestMine(ContextFusionCases):
        factory = MyFusion
        options = {"heads": 2}

`run_conformance` does the same without pytest, for ``python -m hpdm_core.plugins check NAME``.
"""

import unittest
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hpdm_core.base.errors import InputError, did_you_mean
from hpdm_core.plugins import Plugins
from hpdm_core.testing.backbone import BackboneCases
from hpdm_core.testing.backends import BackendCases
from hpdm_core.testing.case import Case, describe_failure
from hpdm_core.testing.data import DatasetCases, VideoReaderCases
from hpdm_core.testing.diffusion import NoiseSamplerCases, NoiseScalingCases, ObjectiveCases
from hpdm_core.testing.evaluation import FeatureExtractorCases, MetricCases
from hpdm_core.testing.fusion import ContextFusionCases
from hpdm_core.testing.layout import ComputationAllocationCases, CoordinateSamplerCases
from hpdm_core.testing.optimizer import OptimizerCases
from hpdm_core.testing.solver import SolverCases

__all__ = [
    "CASES",
    "BackboneCases",
    "BackendCases",
    "Case",
    "ComputationAllocationCases",
    "ContextFusionCases",
    "CoordinateSamplerCases",
    "DatasetCases",
    "FeatureExtractorCases",
    "MetricCases",
    "NoiseSamplerCases",
    "NoiseScalingCases",
    "ObjectiveCases",
    "OptimizerCases",
    "SolverCases",
    "VideoReaderCases",
    "run_conformance",
]

CASES: dict[str, type[Case]] = {
    case.family: case
    for case in (
        ContextFusionCases,
        ComputationAllocationCases,
        CoordinateSamplerCases,
        NoiseScalingCases,
        NoiseSamplerCases,
        ObjectiveCases,
        BackboneCases,
        SolverCases,
        DatasetCases,
        VideoReaderCases,
        FeatureExtractorCases,
        MetricCases,
        OptimizerCases,
        BackendCases,
    )
}
"""The conformance class of each family."""


def run_conformance(
    plugins: Plugins, family: str, key: str, options: Mapping[str, Any] | None = None
) -> list[tuple[str, str | None]]:
    """Run every check of ``family`` on its part ``key``, built with ``options``.

    Returns (check, None) for a check that passed and (check, error) for one that failed; the error is one line.
    A check that does not apply to the part, such as a size that the part refuses, is named ``NAME (skipped:
    reason)`` and counts as passed. If required options were not given, the result is the single entry
    ``("options", "needs options: ...")``.

    Raises InputError for an unknown family or key.
    """
    if family not in CASES:
        raise InputError(
            f"unknown family '{family}'{did_you_mean(family, CASES)}; families: {', '.join(CASES)}"
        )
    registration = plugins.get(family, key)
    case = CASES[family]()
    case.plugins, case.key, case.options = plugins, key, dict(options or {})
    missing = case.missing_options()
    if missing:
        return [("options", f"needs options: {', '.join(missing)} (they have no default)")]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # all tensors are tiny: more threads would be slower
    try:
        return [_run(case, name, file=registration.file) for name in case.checks()]
    finally:
        torch.set_num_threads(threads)


def _run(case: Case, name: str, *, file: Path | None) -> tuple[str, str | None]:
    label = name.removeprefix("test_").replace("_", " ")
    try:
        getattr(case, name)()
    except unittest.SkipTest as skipped:
        return f"{label} (skipped: {skipped})", None
    except Exception as error:
        return label, describe_failure(error, file=file)
    return label, None
