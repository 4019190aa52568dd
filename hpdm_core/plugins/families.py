"""The families of parts: the hook, the key in a study file and the positional arguments of the factories of each."""

from dataclasses import dataclass

__all__ = ["FAMILIES", "Family"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of parts.

    ``name``: the plural used in messages and by ``why FAMILY/KEY``; ``path``: the key in a study file; ``positional``:
    names of the positional parameters that every factory of the family takes; ``optional``: further positional
    parameters, which are passed only to a factory that has them.
    """

    name: str
    path: str
    positional: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def of_cell(self) -> bool:
        """Whether the part belongs to a cell; a backend belongs to a study."""
        return "." in self.path

    @property
    def hook(self) -> str:
        """The name of the hook that registers parts of this family."""
        return f"register_{self.name}"


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(name="context_fusions", path="model.context_fusion", positional=("shape",)),
        Family(
            name="computation_allocations",
            path="model.computation_allocation",
            positional=("blocks", "levels"),
        ),
        Family(name="coordinate_samplers", path="training.coordinate_sampling", positional=("pyramid",)),
        Family(name="noise_scalings", path="diffusion.noise_scaling", positional=("levels",)),
        Family(name="noise_samplers", path="diffusion.noise_sampling", positional=("sigma_in",)),
        Family(name="objectives", path="diffusion.objective", positional=()),
        Family(
            name="backbones",
            path="model.backbone",
            positional=("token_dim", "blocks"),
            optional=("grid",),
        ),
        Family(name="solvers", path="sampling.solver", positional=("sigma_in",)),
        Family(name="datasets", path="data.dataset", positional=("clip", "reader")),
        Family(name="video_readers", path="data.reader", positional=()),
        Family(name="feature_extractors", path="evaluation.metrics.*.extractor", positional=()),
        Family(name="metrics", path="evaluation.metrics.*", positional=()),
        Family(name="optimizers", path="training.optimizer", positional=("named_parameters", "lr")),
        Family(name="backends", path="backend", positional=("runner",)),
    )
}
