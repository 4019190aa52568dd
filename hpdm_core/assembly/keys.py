"""The keys of stored results: SHA-256 of the canonical JSON of all that a stage depends on.

Keys do not contain study and arm names, storage, backend, folders, versions, and ``runtime``. They do contain the
SHA-256 of every plugin file that is used, so that an edited plugin gets new results; and, for options that are
paths, a fingerprint of the content at the path (`hpdm_core.config.content`).
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hpdm_core.assembly.contents import absent_of, contents_of, fingerprint_at, keyed_part
from hpdm_core.base.canonical import digest
from hpdm_core.base.errors import InputError
from hpdm_core.config.content import Known, place_of
from hpdm_core.config.schema import SCHEMA_VERSION, CellConfig, Part, neutral_fields
from hpdm_core.plugins import FAMILIES, Plugins

__all__ = [
    "absent_in",
    "data_key",
    "evaluation_facts",
    "evaluation_key",
    "keyed_section",
    "parts_in",
    "places_in",
    "plugin_hashes",
    "sample_facts",
    "sample_key",
    "train_facts",
    "train_key",
]


def parts_in(config: CellConfig, *sections: str) -> Iterator[tuple[str, Part]]:
    """Yield (family, part) of every part in the named sections of ``config``, including metrics."""
    for family in FAMILIES.values():
        section, _, field = family.path.partition(".")
        if section not in sections:
            continue
        if field == "metrics.*":
            yield from ((family.name, part) for part in config.evaluation.metrics)
        elif "*" not in field:
            yield family.name, getattr(getattr(config, section), field)


def keyed_section(
    config: CellConfig, section: str, plugins: Plugins, known: Known | None = None
) -> dict[str, Any]:
    """Return a section of ``config`` as JSON for a key.

    Parts are converted by `hpdm_core.assembly.contents.keyed_part`. Fields marked `Later` are left out if they have
    their default.
    """
    given = getattr(config, section)
    data: dict[str, Any] = given.model_dump(mode="json")
    for name in neutral_fields(given):
        del data[name]
    for family in FAMILIES.values():
        top, _, field = family.path.partition(".")
        if top == section and "*" not in field:
            data[field] = keyed_part(plugins, family.name, getattr(getattr(config, section), field), known)
    return data


def places_in(config: CellConfig, plugins: Plugins, known: Known | None = None) -> dict[str, str]:
    """Return place -> fingerprint for all paths in ``config`` whose content is part of a key."""
    found: dict[str, str] = {}
    for family, part in parts_in(config, "model", "diffusion", "data", "training", "sampling"):
        found.update(contents_of(plugins, family, part, known))
    start = config.training.start_from
    if start is not None and start.path is not None:
        fingerprint = fingerprint_at(plugins, start.path, known)
        if fingerprint is not None:
            found[place_of(start.path)] = fingerprint
    return found


def absent_in(config: CellConfig, plugins: Plugins, known: Known | None = None) -> list[str]:
    """Return one message per path in ``config`` whose content is part of a key, but which does not exist and has no
    recorded fingerprint.
    """
    sections = ("model", "diffusion", "data", "training", "sampling")
    lines = [
        f"{FAMILIES[family].path} '{use}', option {option}: '{path}' does not exist; allowed is an existing file "
        "or folder"
        for family, part in parts_in(config, *sections)
        for use, option, path in absent_of(plugins, family, part, known)
    ]
    start = config.training.start_from
    if start is not None and start.path is not None and fingerprint_at(plugins, start.path, known) is None:
        lines.append(
            f"training.start_from.path: '{start.path}' does not exist; allowed is a file of weights, such as a trained "
            "model's model.safetensors"
        )
    return lines


def plugin_hashes(plugins: Plugins, parts: Iterable[tuple[str, Part]]) -> dict[str, str]:
    """Return FAMILY/KEY -> SHA-256 of the plugin's source, for parts of plugins that were named as a file or module."""
    found = {}
    for family, part in parts:
        for inner, each in plugins.nested(family, part):
            source = plugins.get(inner, each.use).sha256
            if source is not None:
                found[f"{inner}/{each.use}"] = source
    return found


def train_key(
    config: CellConfig, plugins: Plugins, known: Known | None = None, *, base: str | None = None
) -> str:
    """Return the key of the trained weights: a hash of all that they depend on, including the seed.

    ``known``: recorded fingerprints of paths that no longer exist; ``base``: the train key of the arm whose model
    training starts from.
    """
    return digest({**train_facts(config, plugins, known, base=base), "seed": config.seed})


def train_facts(
    config: CellConfig, plugins: Plugins, known: Known | None = None, *, base: str | None = None
) -> dict[str, Any]:
    """Return what `train_key` hashes, without the seed. Raises `InputError` if ``base`` is needed and missing."""
    sections = ("model", "diffusion", "data", "training")
    facts = {section: keyed_section(config, section, plugins, known) for section in sections}
    start = config.training.start_from
    if start is not None and start.path is not None:
        found = fingerprint_at(plugins, start.path, known)
        facts["training"]["start_from"] = (
            {"nothing at": str(start.path)} if found is None else {"content": found}
        )
    elif start is not None:
        if base is None:
            raise InputError(
                f"training.start_from.arm: '{start.arm}' is an arm of a study; allowed outside a study is "
                "training.start_from.path"
            )
        facts["training"]["start_from"] = {"train": base}  # the key does not contain the arm's name
    if start is not None and start.resize:
        facts["training"]["start_from"]["resize"] = list(start.resize)
    return {
        "schema": SCHEMA_VERSION,
        **facts,
        "plugins": plugin_hashes(plugins, parts_in(config, *sections)),
    }


def data_key(facts: Mapping[str, Any], config: CellConfig, plugins: Plugins) -> str:
    """Return the key of results on real clips alone; ``facts``: `hpdm_core.metrics.interface.data_facts`."""
    return digest({"data": dict(facts), "plugins": plugin_hashes(plugins, parts_in(config, "data"))})


def sample_key(train_key: str, config: CellConfig, plugins: Plugins, known: Known | None = None) -> str:
    """Return the key of the samples drawn from the weights ``train_key``. Their number is not part of it."""
    return digest(sample_facts(train_key, config, plugins, known))


def sample_facts(
    train_key: str, config: CellConfig, plugins: Plugins, known: Known | None = None
) -> dict[str, Any]:
    """Return what `sample_key` hashes."""
    return {
        "train": train_key,
        "sampling": keyed_section(config, "sampling", plugins, known),
        "plugins": plugin_hashes(plugins, parts_in(config, "sampling")),
    }


def evaluation_key(
    base_key: str,
    protocol: Mapping[str, Any],
    *,
    part: Part | None = None,
    plugins: Plugins | None = None,
) -> str:
    """Return the key of one metric's result on the samples, weights or data with the key ``base_key``.

    With the metric's validated ``part`` and ``plugins``, the key also contains the hashes of the plugin files of
    the metric and its extractor.
    """
    return digest(evaluation_facts(base_key, protocol, part=part, plugins=plugins))


def evaluation_facts(
    base_key: str, protocol: Mapping[str, Any], *, part: Part | None = None, plugins: Plugins | None = None
) -> dict[str, Any]:
    """Return what `evaluation_key` hashes."""
    hashes = plugin_hashes(plugins, [("metrics", part)]) if part is not None and plugins is not None else {}
    return {"base": base_key, "protocol": dict(protocol), "plugins": hashes}
