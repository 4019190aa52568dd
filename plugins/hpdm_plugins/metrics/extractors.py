"""Feature extractors that need no download: a fixed random network, and simple statistics."""

from hpdm_core.hookspecs import Register, hookimpl
from hpdm_core.metrics.distances.statistics import Statistics
from hpdm_core.metrics.networks.random3d import Random3D

__all__ = ["register_feature_extractors"]


@hookimpl
def register_feature_extractors(register: Register) -> None:
    """Register random3d and statistics."""
    register("random3d", Random3D, source="HPDM: fixed random 3-D convolutional network")
    register("statistics", Statistics, source="HPDM: contrast, edges, motion and colour of a video")
