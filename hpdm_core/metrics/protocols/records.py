"""Protocol records: everything that a published kind of number depends on, as frozen data.

"FVD" names many different numbers that do not compare. A record specifies one of them: detector, weights, the choice,
preparation and number of clips, and the arithmetic. Known protocols are YAML files, ``FAMILY/NAME.yaml``, in the folder
``protocols`` beside a plugin package's modules; your own protocol is a file of the same form. Two numbers compare if
their records are equal; `differences` lists the fields in which two records differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import Field

from hpdm_core.base.canonical import canonical_json
from hpdm_core.base.errors import InputError, did_you_mean
from hpdm_core.config.loader import Document, load_yaml
from hpdm_core.config.problems import Problem, check
from hpdm_core.config.schema import Frozen, Part

if TYPE_CHECKING:
    from hpdm_core.plugins import Plugins

__all__ = [
    "FORMAT",
    "Preparation",
    "ProtocolRecord",
    "ScoreRule",
    "SideRule",
    "differences",
    "identity_of",
    "known_protocols",
    "leaves",
    "load_record",
    "record_from",
]

FORMAT: Final = 1
"""Version of this file format; a record's own ``version`` counts changes of its content."""

NOTES = ("quirks", "choices", "source")
"""Fields that explain a record and do not affect the number."""

Positive = Annotated[int, Field(gt=0)]


class Preparation(Frozen):
    """What happens to a clip's frames before the detector sees them, in this order."""

    size: tuple[Positive, Positive] | Literal["stored", "as_fakes"] = "stored"
    """Height and width in pixels to which frames of another size are resized; ``stored`` leaves both sides unchanged,
    ``as_fakes`` resizes reals to the size of the fakes."""
    resize: Literal["lanczos", "bilinear", "bilinear_antialias", "area"] = "lanczos"
    """lanczos and bilinear_antialias use every source pixel; bilinear (half-pixel centres) uses four; area averages."""
    crop: Literal["centre", "squash"] = "centre"
    """centre: resize so that the size is covered, then cut out the centre; squash: change the aspect ratio."""
    average: tuple[Positive, Positive, Positive] = (1, 1, 1)
    """Average over boxes of so many frames, rows and columns, which gives a coarser level of a video pyramid."""
    quantise: Literal["round", "truncate"] = "round"
    """How values become integers after each of the steps above."""
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] | None = None
    """Encode and decode frames as JPEG once (chroma at half size, as Pillow does), except frames of JPEG files that no
    step above has changed; null for no encoding."""


class SideRule(Frozen):
    """How the clips of one side, real or fake, are chosen."""

    count: Positive | Literal["all"]
    """Number of clips."""
    fewer: Literal["refuse", "use_all"] = "refuse"
    """What happens if there are fewer clips than ``count``."""
    split: str | None = None
    """Split of a data set with lists of videos: ``train``, ``test`` or ``train+test``; null for sides without lists."""
    order: Literal["name", "natural"] = "natural"
    """How files are sorted: name: by characters, so that 10 comes before 2; natural: by the numbers in their names."""
    choose: Literal["first", "random", "random_windows"] = "first"
    """The first files, one clip of each; random files, one clip of each; or random windows of all files."""
    offset: Literal["start", "random"] = "start"
    """Where in its video a clip begins."""
    stride: Positive = 1
    """Every stride-th frame is used."""
    window: Positive | None = None
    """A random clip begins at a frame from which at least so many frames are left; shorter videos are left out. null:
    as many frames as the clip covers."""
    reach: Literal["exact", "frames_times_stride"] = "exact"
    """How many frames a video must have: (frames - 1) * stride + 1, or frames * stride."""
    short: Literal["drop", "refuse"] = "refuse"
    """What happens to videos with fewer frames."""
    prepare: Preparation = Preparation()


class ScoreRule(Frozen):
    """Splits, shuffling and repeats of an Inception Score."""

    splits: Positive = 10
    shuffle: Literal["none", "numpy_42"] = "none"
    """numpy_42: by numpy's RandomState(42)."""
    epsilon: Annotated[float, Field(ge=0)] = 0.0
    """Added inside the logarithms."""
    repeats: Positive = 1
    """The clips are split into so many equal parts; the result is the mean and standard deviation of their scores."""


class ProtocolRecord(Frozen):
    """One complete protocol; see the module's docstring."""

    format: Literal[1] = FORMAT
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")]
    version: Positive = 1
    title: Annotated[str, Field(min_length=1)]
    """The name of the number, such as FVD, which is reserved for features of I3D."""
    source: Annotated[str, Field(min_length=1)]
    """The publication or code that the protocol is from."""
    measure: Literal["frechet", "kernel", "inception_score"]
    detector: Part
    """A feature extractor; its options are network, weights, batch-norm eps, resize, crop and range."""
    frames: Annotated[int, Field(ge=2)]
    """Frames of a clip in the detector's input."""
    reals: SideRule | None = None
    fakes: SideRule
    ddof: Literal[0, 1] = 0
    """Covariances are divided by N - ddof."""
    score: ScoreRule | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the choice of random files and offsets."""
    quirks: tuple[str, ...] = ()
    """Unexpected properties of this protocol, which are reproduced here and shown with every number."""
    choices: tuple[str, ...] = ()
    """What its source leaves open, and what was chosen here."""

    def sides(self) -> dict[str, SideRule]:
        """Return name -> rule of the sides that the protocol has, reals first."""
        both = {"reals": self.reals, "fakes": self.fakes}
        return {name: rule for name, rule in both.items() if rule is not None}


def known_protocols(plugins: Plugins) -> dict[str, Path]:
    """Return the protocols that plugins ship: FAMILY/NAME -> file."""
    found: dict[str, Path] = {}
    for folder in plugins.protocol_folders:
        for file in sorted(folder.glob("*/*.yaml")):
            found.setdefault(f"{file.parent.name}/{file.stem}", file)
    return found


def load_record(given: str, plugins: Plugins) -> ProtocolRecord:
    """Return the protocol called ``given``, a name or a file. Raises InputError with every problem."""
    known = known_protocols(plugins)
    if given in known:
        return record_from(load_yaml(known[given]), plugins)
    if given.endswith((".yaml", ".yml")) or Path(given).is_file():
        record = record_from(load_yaml(given), plugins)
        if record.name in known and record != record_from(load_yaml(known[record.name]), plugins):
            raise InputError(
                f"{given}: name: '{record.name}' is a known protocol, and this file differs from it; give it "
                "a name of its own"
            )
        return record
    families: dict[str, list[str]] = {}
    for name in known:
        families.setdefault(name.partition("/")[0], []).append(name.partition("/")[2])
    listed = "; ".join(f"{family}/{{{','.join(names)}}}" for family, names in families.items())
    nearest = did_you_mean(given, known)
    raise InputError(f"--protocol {given}: no such protocol{nearest}; known: {listed}; or a file, X.yaml")


def record_from(document: Document, plugins: Plugins) -> ProtocolRecord:
    """Return the record in ``document``, with the detector's options checked and their defaults filled in."""
    record, problems = check(ProtocolRecord, document.data)
    if record is None:
        raise InputError(*(f"{document.where(problem.path)}: {problem}" for problem in problems))
    part, problems = plugins.check("feature_extractors", record.detector, ("detector",))
    problems += _relations(record)
    if problems:
        raise InputError(*(f"{document.where(problem.path)}: {problem}" for problem in problems))
    return record.model_copy(update={"detector": part})


def _relations(record: ProtocolRecord) -> list[Problem]:
    """Return the conflicts between fields that are valid by themselves."""
    problems = []
    if record.measure == "inception_score":
        if record.reals is not None:
            problems.append(Problem(("reals",), "an inception_score compares with no reals; leave it out"))
        if record.score is None:
            problems.append(Problem(("score",), "missing; an inception_score says its splits"))
    else:
        if record.reals is None:
            problems.append(Problem(("reals",), f"missing; a {record.measure} distance compares with reals"))
        if record.score is not None:
            problems.append(
                Problem(("score",), f"belongs to an inception_score, not to a {record.measure} distance")
            )
    measures = {"FVD": "frechet", "KVD": "kernel", "IS": "inception_score"}
    measure = measures.get(record.title.partition(" ")[0].upper(), record.measure)
    if measure != record.measure:
        problems.append(Problem(("title",), f"'{record.title}' is a {measure}, not a {record.measure}"))
    title, use = record.title.upper(), record.detector.use
    if use != "i3d" and (
        title.startswith("FVD") or (title.startswith("KVD") and f"[{use}]".upper() not in title)
    ):
        name = f"{record.measure}[{use}]"
        problems.append(
            Problem(
                ("title",), f"'{record.title}' is a distance on i3d; on {use} it has another name, as {name}"
            )
        )
    return problems


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (field, first's value, second's value) for each field in which two records in JSON differ.

    Notes (`NOTES`) are not compared.
    """
    a, b = dict(leaves(first)), dict(leaves(second))
    fields = [*a, *(field for field in b if field not in a)]
    return [
        (field, a.get(field, ABSENT), b.get(field, ABSENT))
        for field in fields
        if field.partition(".")[0] not in NOTES and a.get(field, ABSENT) != b.get(field, ABSENT)
    ]


def identity_of(record: Mapping[str, Any]) -> str:
    """Return the first 12 digits of the SHA-256 of a record in JSON without its notes (`NOTES`)."""
    kept = {key: value for key, value in record.items() if key not in NOTES}
    return hashlib.sha256(canonical_json(kept).encode()).hexdigest()[:12]


ABSENT = "(absent)"


def leaves(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted field, value) of a record in JSON; lists are not split."""
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
