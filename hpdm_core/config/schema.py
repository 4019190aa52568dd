"""The validated, frozen form of a cell: what is asked for, with every default filled in.

A cell is one model, trained once with one seed, sampled and evaluated. Fields are documented where they stand; the
three keys (`hpdm_core.assembly.keys`) are hashes of parts of this form. Parts keep their options as given plus
defaults, so that a changed default changes the key.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_serializer, model_validator

__all__ = [
    "SCHEMA_VERSION",
    "CellConfig",
    "DataConfig",
    "DiffusionConfig",
    "EvaluationConfig",
    "ModelConfig",
    "Part",
    "RuntimeConfig",
    "SamplingConfig",
    "StartFrom",
    "TrainingConfig",
]

SCHEMA_VERSION = 1

Positive = Annotated[int, Field(gt=0)]
Precision = Literal["fp32", "tf32", "bf16", "fp64"]
AttentionPrecision = Literal["fp32", "bf16"]
Triple = tuple[Positive, Positive, Positive]  # frames, height, width


class Frozen(BaseModel):
    """Base of the configuration models: unknown keys refused, no mutation, no silent coercion of types."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=False, allow_inf_nan=False, hide_input_in_errors=True
    )


@dataclass(frozen=True)
class Later:
    """Marks a field, or an option of a part, that came after keys were promised to last: at its default it is
    left out of the keys, so that work done before it came is not done again.
    """


def neutral_fields(model: BaseModel) -> list[str]:
    """Return the fields of ``model`` that are marked `Later` and have their default."""
    return [
        name
        for name, field in type(model).model_fields.items()
        if any(isinstance(mark, Later) for mark in field.metadata) and getattr(model, name) == field.default
    ]


class Part(BaseModel):
    """A registered part and its options: ``NAME`` or ``{use: NAME, option: value}`` in a file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    use: str
    """Name of the part within its family."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Option of the part -> value; an option that is left out has its default."""

    @model_validator(mode="before")
    @classmethod
    def _from_file(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"use": value, "options": {}}
        if isinstance(value, dict) and "use" in value and set(value) != {"use", "options"}:
            return {
                "use": value["use"],
                "options": {key: item for key, item in value.items() if key != "use"},
            }
        return value

    @model_serializer
    def _to_file(self) -> dict[str, Any]:
        return {"use": self.use, **self.options}


class ModelConfig(Frozen):
    """The network and the pyramid that it works on."""

    video: Triple
    """Frames, height and width of a whole video in pixels, R in the paper."""
    patch: Triple
    """Frames, height and width of a patch in pixels, the same on every level, r in the paper."""
    token: Triple
    """Frames, height and width of a token in pixels."""
    levels: Positive = 3
    """Levels of the pyramid, L; level 0 is the coarsest."""
    channels: Positive = 3
    """Colour channels."""
    classes: Annotated[int, Field(ge=0)] = 0
    """Number of class labels; 0 for an unconditional model."""
    token_dim: Positive
    """Width of a token, D."""
    blocks: Positive
    """Blocks of the backbone, B."""
    sigma_on_tokens: bool = True
    """Whether the sigma embedding is added to a level's tokens after the tokenizer, so that tokens that serve as
    context before any latent wrote to them say how noisy they are."""
    table_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation that the learned tables (latents, positions, levels, classes) start with; RIN's is 0.02."""
    zero_residual: bool = False
    """Whether residual branches and the output map start at zero, not as RIN's (Glorot). Helps small models."""
    backbone: Part = Part(use="rin")
    """The blocks that work on the tokens."""
    context_fusion: Part = Part(use="deep")
    """What a patch takes from the patches of coarser levels that contain it."""
    computation_allocation: Part = Part(use="linear")
    """How many levels each block runs: the coarsest level runs all blocks, finer levels run the last ones."""


class DiffusionConfig(Frozen):
    """The noise process. sigma is the noise level of the process, sigma_eff = sigma_in * sigma in data units."""

    sigma_min: Annotated[float, Field(gt=0)] = 0.002
    """The sigma that the network's noise embedding maps to 0."""
    sigma_max: Annotated[float, Field(gt=0)] = 80.0
    """The sigma that the network's noise embedding maps to 1."""
    noise_scaling: Part = Part(use="exponential")
    """The input scale sigma_in of each level."""
    noise_sampling: Part = Part(use="independent")
    """How training draws the noise level sigma of each level."""
    objective: Part = Part(use="snap_v")
    """What the network predicts, and how the loss is weighted."""


class DataConfig(Frozen):
    """Where the clips come from, and how a level is made of a full-resolution clip."""

    dataset: Part
    """The clips of training and the held-out clips."""
    reader: Part = Part(use="pyav")
    """The library that decodes video files."""
    downsampling: Literal["area", "trilinear", "centre_frame"] = "area"
    """How a level's pixels are made from the full resolution. ``area``: mean of the pixels that a pixel of the level
    covers; ``trilinear``: linear interpolation at its centre; ``centre_frame``: one frame of each group of frames, and
    the mean in height and width."""


class Arithmetic(Frozen):
    """The arithmetic of a stage. It changes results, so what is asked for here is part of the stage's key;
    the device that it runs on is not.
    """

    precision: Annotated[Precision, Later()] = "tf32"
    """tf32: float32, with matrix products rounded to TF32 on CUDA; fp32: not even those; bf16: matrix products and
    attention of the blocks in bfloat16, residuals, norms and softmax's sums in float32; fp64: all in float64, to
    compare runs."""
    attention: Annotated[AttentionPrecision | None, Later()] = None
    """Attention of the blocks (what they compute by scaled_dot_product_attention) in another precision than the rest:
    fp32 or bf16; null follows ``precision``."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        """Write attention null where it has the precision that is asked for anyway: one arithmetic, one key."""
        if self.attention == ("bf16" if self.precision == "bf16" else "fp32"):
            object.__setattr__(self, "attention", None)
        return self


class StartFrom(Frozen):
    """The model whose averaged weights a training starts from: one of an arm, or a file."""

    arm: str | None = None
    """An arm of the same study: its model of the same seed, which is trained first, once for all who start from it."""
    path: Path | None = None
    """A file of weights (safetensors), such as a trained model's model.safetensors; keys take its content."""
    resize: Annotated[tuple[Literal["levels"], ...], Later()] = ()
    """Which tables of another shape are taken too. ``levels``: those with a row per level, from a model of fewer
    levels; its rows become the first ones, those of the coarsest levels."""

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.arm is None) == (self.path is None):
            raise ValueError("should be {arm: NAME} or {path: FILE}, one of them")
        return self


class TrainingConfig(Arithmetic):
    """Everything that the trained weights depend on besides model, diffusion, data and seed."""

    steps: Positive
    """Optimizer steps."""
    batch: Positive
    """Videos per optimizer step, over all processes."""
    learning_rate: Annotated[float, Field(gt=0)]
    """Peak learning rate."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up from 0; a cosine to 0 at the last step follows."""
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest global norm of the gradient; null for no clipping."""
    label_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Probability of hiding a video's label, drawn once per video and shared by its levels."""
    self_conditioning: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Probability that a video's latents of the first pass are fed into the second."""
    ema_halflife: Annotated[float, Field(gt=0)] | None = None
    """Half-life of the weight average in steps; null for min(6000, 0.06 * steps)."""
    optimizer: Part = Part(use="adamw")
    """The optimizer; its learning rate is ``training.learning_rate``."""
    coordinate_sampling: Part = Part(use="nested_uniform")
    """Where in a video training takes the patches of each level."""
    keep: tuple[Positive, ...] = ()
    """Steps whose checkpoints are kept besides the two newest."""
    start_from: Annotated[StartFrom | None, Later()] = None
    """Another model: weights of equal name and shape start from its average, the rest as it would; null for none."""


class SamplingConfig(Arithmetic):
    """The tiled cascade."""

    solver: Part = Part(use="edm")
    """The solver that integrates each level from noise to data."""
    overlap: tuple[Literal["f", "h", "w"], ...] = ()
    """Axes on which neighbouring tiles overlap by half, each once; results are averaged at every step. Kept in
    the order f, h, w, so that one set of axes has one key."""
    context_sigma_eff: Annotated[float, Field(ge=0)] = 0.05
    """Noise added to finished parents before they serve as context, in data units."""

    @field_validator("overlap")
    @classmethod
    def _one_order(cls, axes: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(axes)) != len(axes):
            raise ValueError("should name each axis once")
        return tuple(sorted(axes))  # f, h, w is the alphabet's order too


class EvaluationConfig(Frozen):
    """What is measured. Counts of clips extend what is there: they are not part of a sample's key."""

    samples: Positive = 64
    """Generated videos per cell."""
    reals: Positive = 256
    """Real clips per side of a distance."""
    metrics: tuple[Part, ...] = ()
    """The metrics of every cell; empty for none."""


class RuntimeConfig(Frozen):
    """How a cell is run; outside every key."""

    device: str = "cpu"
    """Device of torch: ``cpu``, ``cuda``, or ``cuda:N`` for one of several cards."""
    threads: Positive | None = None
    """Threads of torch on the CPU; null leaves torch's own choice."""
    strategy: Literal["single", "ddp", "fsdp"] = "single"
    """How several processes train one network: replicated (ddp) or sharded (fsdp, FSDP2). In one process all are the
    same."""
    precision: Precision | None = Field(default=None, exclude=True)
    """The older name of ``training.precision`` and ``sampling.precision``; read as both."""
    compile: bool | Literal["training", "sampling"] = False
    """Whether training and sampling, or one of them, are compiled (torch.compile): a training step as a whole, and the
    sampler's call of the network. Without a compiler they go on as they are and say so."""
    activation_checkpointing: bool = False
    """Whether a block keeps only its inputs for the backward pass and is run again there: less memory, more time."""
    micro_batch: Positive | None = None
    """Videos that one process takes through the network together while training, gradients added up; null for all of
    its share of the batch."""
    sample_batch: Positive = 16
    """Videos that are sampled together."""
    tile_batch: Positive = 256
    """Tiles that go through the network together."""
    cache: Literal["contexts", "none"] = "contexts"
    """What sampling keeps of the finished coarser levels: the contexts of every tile, or nothing, for comparison."""
    cache_memory: Annotated[float, Field(ge=0)] | None = None
    """Memory in GiB for contexts on the device; null for half of what is free. What does not fit goes to host memory on
    CUDA, and to a scratch file on the CPU."""
    peak_tflops: Annotated[float, Field(gt=0)] = 156.0
    """Peak rate of one GPU, in 10^12 operations per second, that predicted times assume: an A100's with TF32."""
    utilisation: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Share of the peak rate that predicted times assume. The paper's 4.4 videos/s per A100 in training HPDM-L are
    about 63 TFLOP/s by our count, 0.4 of the peak."""
    gpu_memory: Annotated[float, Field(gt=0)] = 80.0
    """Memory in GiB of the card that training is meant for; a dry run warns where a step is predicted to take more."""
    checkpoint_every: Positive = 250
    """Steps between checkpoints."""
    log_every: Positive = 10
    """Steps between lines of metrics.jsonl."""
    prefetch: Annotated[int, Field(ge=0)] = 0
    """Training batches prepared ahead in a thread, or by each worker; 0 for none (a worker: 2)."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that make training batches; 0 for none. The batches are the same."""
    clip_cache: Path | None = None
    """Folder in which decoded, resized frames of video files are kept, by content; may be shared."""
    clip_cache_size: Annotated[float, Field(gt=0)] = 20.0
    """Most GiB in that folder; what was used longest ago goes first."""
    deterministic: bool = False
    """Whether torch is asked for deterministic algorithms: on CUDA the same bits at every run, in more time; on the CPU
    they are the same without."""


class CellConfig(Frozen):
    """One cell, whole."""

    model: ModelConfig
    """The network and the pyramid of patches that it works on."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """The noise process and the training objective."""
    data: DataConfig
    """The clips, and how the levels are made from them."""
    training: TrainingConfig
    """How the network is trained."""
    sampling: SamplingConfig = SamplingConfig()
    """How videos are generated."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is measured, and on how many videos."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Device, memory, speed and checkpoints. No key of a stage holds these values."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of all random streams of the cell; a study file lists ``seeds`` instead."""

    @model_validator(mode="after")
    def _older_name(self) -> Self:
        """Take ``runtime.precision`` over as the precision of training and of sampling."""
        old = self.runtime.precision
        if old is None:
            return self
        for name in ("training", "sampling"):
            stage: Arithmetic = getattr(self, name)
            if "precision" in stage.model_fields_set and stage.precision != old:
                raise ValueError(
                    f"runtime.precision: is the older name of training.precision and sampling.precision, got "
                    f"'{old}' beside {name}.precision '{stage.precision}'; allowed is one of them"
                )
            given = stage.model_dump(exclude_unset=True) | {"precision": old}
            object.__setattr__(self, name, type(stage).model_validate(given))
        object.__setattr__(self, "runtime", self.runtime.model_copy(update={"precision": None}))
        return self
