"""`CellContext`: a metric's access to a cell, which opens files only when they are asked for.

Features of real clips depend on the data alone and are stored for all cells in a folder of the store. A clip is
downsampled to a level as in training and then rounded to uint8, as stored generated videos are.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hpdm_core.assembly.keys import parts_in, plugin_hashes
from hpdm_core.base import distributed
from hpdm_core.base.errors import InputError, TroubleError
from hpdm_core.base.files import whole_or_absent
from hpdm_core.base.randomness import generator
from hpdm_core.config.schema import Arithmetic, Part
from hpdm_core.metrics.corruptions import COARSEST, CORRUPTIONS, enlarged
from hpdm_core.metrics.features import FeatureBuffer
from hpdm_core.metrics.interface import data_facts
from hpdm_core.pyramid import downsample

if TYPE_CHECKING:
    from hpdm_core.assembly.assembly import Assembly
    from hpdm_core.assembly.denoiser import Denoiser
    from hpdm_core.data.dataset import Clip, Split
    from hpdm_core.metrics.interface import FeatureExtractor, Features

__all__ = ["CellContext"]

_BATCH = 16  # videos per batch; fixed, so that features are bit-identical between runs


class CellContext:
    """A metric's access to a cell.

    ``model_path``: the averaged weights; ``samples_folder``: the generated videos; ``train_result``: the train
    stage's result; ``cache``: a folder for the features of real clips, None to keep them in memory only.
    """

    def __init__(
        self,
        assembly: Assembly,
        *,
        model_path: Path | None = None,
        samples_folder: Path | None = None,
        train_result: Mapping[str, Any] | None = None,
        cache: Path | None = None,
    ) -> None:
        self.assembly = assembly
        self.model_path = model_path
        self.samples_folder = samples_folder
        self.train_result: Mapping[str, Any] = train_result or {}
        self.facts: dict[str, Any] = {}
        """Facts found while measuring, for the record: labels, the data's fingerprint."""
        self.details: dict[str, Any] = {}
        """Results of this cell besides the rows: intervals, points of a curve."""
        self.cache_folder = cache
        self._extractors: dict[str, FeatureExtractor] = {}
        self._features: dict[str, list[Features]] = {}

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return torch.device(self.assembly.config.runtime.device)

    @cached_property
    def denoiser(self) -> Denoiser:
        """The trained model with averaged weights, loaded on first use."""
        from hpdm_core.training.trainer import load_ema_model

        if self.model_path is None or not self.model_path.is_file():
            raise TroubleError(f"weights: no file {self.model_path}; train the cell first")
        return self.assembly.denoiser(load_ema_model(self.assembly, self.model_path), Arithmetic())

    # Videos

    def clip(self, stream: str, split: Split, number: int) -> Clip:
        """Return clip ``number`` of the fixed list that `hpdm_core.data.dataset.fixed_clips` returns whole."""
        return self.assembly.dataset.draw(split, generator("evaluation", stream, split, number))

    @cached_property
    def has_held_out(self) -> bool:
        """Whether the data have a held-out split."""
        try:
            self.clip("reals", "held_out", 0)
        except InputError:
            return False
        return True

    def samples(self, level: int, indices: Sequence[int]) -> Tensor:
        """Return generated videos ``indices``, uint8 [n, F, H, W, C]."""
        from hpdm_core.sampling.files import read_level

        if self.samples_folder is None:
            raise TroubleError("samples: no folder was given; sample the cell first")
        return read_level(self.samples_folder, indices, level)

    def reals(self, split: Split, numbers: Sequence[int]) -> tuple[list[Tensor], list[int]]:
        """Return real clips on every level, uint8 [n, F, H, W, C] each, and their labels."""
        pyramid, mode = self.assembly.pyramid, self.assembly.config.data.downsampling
        clips = [self.clip("reals", split, number) for number in numbers]
        videos = torch.stack([clip.video for clip in clips])
        levels = [
            _to_uint8(downsample(videos, pyramid.pitch(level), mode)) for level in range(pyramid.levels)
        ]
        return levels, [clip.label for clip in clips]

    # Features

    def extractor(self, part: Part) -> FeatureExtractor:
        """Return the feature extractor ``part``, built once."""
        name = part.model_dump_json()
        if name not in self._extractors:
            self._extractors[name] = self.assembly.make("feature_extractors", part)
        return self._extractors[name]

    def extractor_facts(self, part: Part) -> dict[str, Any]:
        """Return everything that features by ``part`` depend on besides the videos, as JSON, for keys of caches."""
        places = getattr(self.extractor(part), "places", ())
        given = part.model_dump(mode="json")
        return {
            "extractor": self.extractor(part).describe(),
            # `describe` may leave out options, so add them; it has the hashes of files, so leave out their paths.
            "part": {name: value for name, value in given.items() if name not in places},
            "plugins": plugin_hashes(self.assembly.plugins, [("feature_extractors", part)]),
            "torch": torch.__version__,
        }

    def fake_features(self, part: Part) -> list[Features]:
        """Return the features [n, d] of all ``evaluation.samples`` generated videos, per level."""
        from hpdm_core.sampling.files import read_label

        if self.samples_folder is None:
            raise TroubleError("samples: no folder was given; sample the cell first")
        folder = self.samples_folder
        count = self.assembly.config.evaluation.samples
        extract, held = self.extractor(part).features, FeatureBuffer()

        def work(batch: range) -> list[Features]:
            levels = range(self.assembly.config.model.levels)
            return [held.keep(extract(self.samples(level, batch).to(self.device))) for level in levels]

        done = distributed.spread(list(_batches(count)), work)
        levels = [np.concatenate(made) for made in zip(*done, strict=True)]
        self.facts["labels_of_fakes"] = _counted([read_label(folder, index) for index in range(count)])
        return levels

    def real_features(
        self, part: Part, *, split: Split, count: int, corruption: str | None = None
    ) -> list[Features]:
        """Return the features [count, d] of real clips per level; ``corruption`` is applied after downsampling."""
        asked = {
            **data_facts(self.assembly.config, self.assembly.plugins),
            "fingerprint": self.data_fingerprint,
            **self.extractor_facts(part),
            "data_plugins": plugin_hashes(self.assembly.plugins, parts_in(self.assembly.config, "data")),
            "split": split,
            "count": count,
            "corruption": corruption,
        }
        key = _sha256(asked)
        if key not in self._features:
            arrays = self.assembly.config.model.levels + 1
            found = distributed.on_main(lambda: self._cached(key, arrays))
            if found is None:
                found = self._extract_reals(part, split=split, count=count, corruption=corruption)
                if distributed.is_main():
                    self._keep(key, found)
            self._features[key] = found[:-1]
            self.facts[f"labels_of_reals_{split}"] = _counted(found[-1].astype(int).tolist())
        return self._features[key]

    def kept(self, facts: Mapping[str, Any], make: Callable[[], list[Features]]) -> list[Features]:
        """Return the arrays that ``make`` computes from real clips, stored for all cells.

        ``facts`` (JSON) holds everything besides the data that they depend on.
        """
        asked = {
            **data_facts(self.assembly.config, self.assembly.plugins),
            "fingerprint": self.data_fingerprint,
            "facts": facts,
            "plugins": plugin_hashes(self.assembly.plugins, parts_in(self.assembly.config, "data")),
            "torch": torch.__version__,
        }
        key = _sha256(asked)
        found = distributed.on_main(lambda: self._cached(key, 1))
        if found is None:
            found = make()
            if distributed.is_main():
                self._keep(key, found)
        return found

    @cached_property
    def data_fingerprint(self) -> str:
        """SHA-256 of the dataset's description of its files. Adds it, the dataset's name and stride to ``facts``."""
        described = self.assembly.dataset.describe()
        self.facts["dataset"] = described.get("name", self.assembly.config.data.dataset.use)
        self.facts["stride"] = described.get("stride", 1)
        self.facts["data_fingerprint"] = _sha256(described)
        return str(self.facts["data_fingerprint"])

    def _extract_reals(
        self, part: Part, *, split: Split, count: int, corruption: str | None
    ) -> list[Features]:
        """Return the features per level, then the labels [count]."""
        extract, held = self.extractor(part).features, FeatureBuffer()

        def work(batch: range) -> tuple[list[int], list[Features]]:
            levels, drawn = self.reals(split, batch)
            made = []
            for level, videos in enumerate(levels):
                if corruption == COARSEST:
                    pairs = zip(levels[0], videos, strict=True)
                    videos = torch.stack([enlarged(coarse, clip) for coarse, clip in pairs])
                elif corruption is not None:
                    spoil = CORRUPTIONS[corruption]
                    streams = [generator("evaluation", corruption, level, number) for number in batch]
                    videos = torch.stack(
                        [spoil(clip, stream) for clip, stream in zip(videos, streams, strict=True)]
                    )
                made.append(held.keep(extract(videos.to(self.device))))
            return drawn, made

        done = distributed.spread(list(_batches(count)), work)
        labels = [label for drawn, _ in done for label in drawn]
        parts = zip(*(made for _, made in done), strict=True)
        return [*(np.concatenate(made) for made in parts), np.asarray(labels, dtype=np.float64)]

    def _cached(self, key: str, count: int) -> list[Features] | None:
        if self.cache_folder is None:
            return None
        try:
            with (
                (self.cache_folder / f"{key}.npz").open("rb") as handle,  # np.load leaves a damaged file open
                np.load(handle, allow_pickle=False) as file,
            ):
                return [file[f"array{index}"] for index in range(count)]
        except (
            OSError,
            ValueError,
            KeyError,
            EOFError,
            zipfile.BadZipFile,
        ):  # missing or damaged: compute again
            return None

    def _keep(self, key: str, arrays: list[Features]) -> None:
        if self.cache_folder is None:
            return
        # Only a cache: go on without it where it cannot be written, such as in another user's store.
        with contextlib.suppress(OSError):
            self.cache_folder.mkdir(parents=True, exist_ok=True)
            with whole_or_absent(self.cache_folder / f"{key}.npz") as handle:
                np.savez(handle, **{f"array{index}": made for index, made in enumerate(arrays)})  # type: ignore[arg-type]


def _to_uint8(videos: Tensor) -> Tensor:
    from hpdm_core.sampling.files import to_uint8

    return to_uint8(videos)


def _batches(count: int) -> Iterator[range]:
    return (range(start, min(start + _BATCH, count)) for start in range(0, count, _BATCH))


def _counted(labels: Sequence[int]) -> dict[str, int]:
    return {str(label): count for label, count in sorted(Counter(labels).items())}


def _sha256(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
