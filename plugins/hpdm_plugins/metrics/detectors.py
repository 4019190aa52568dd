"""Feature extractors that need weights: I3D and C3D, which the published FVD and Inception Score use."""

from hpdm_core.hookspecs import Register, hookimpl
from hpdm_core.metrics.networks.detectors import C3DDetector, I3DDetector

__all__ = ["register_feature_extractors"]


@hookimpl
def register_feature_extractors(register: Register) -> None:
    """Register i3d and c3d."""
    register("i3d", I3DDetector, source="Carreira & Zisserman 2017 (1705.07750), Kinetics-400 logits")
    register("c3d", C3DDetector, source="Tran et al. 2015 (1412.0767), fine-tuned on UCF-101; TGAN's")
