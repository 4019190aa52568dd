"""Canonical JSON of a value, and its SHA-256. Keys are such hashes."""

import hashlib
import json
from typing import Any

from pydantic import BaseModel

__all__ = ["canonical_json", "digest"]


def canonical_json(value: Any) -> str:
    """Return the canonical JSON text of ``value``: keys sorted, no spaces, tuples as lists, models as objects.

    Raises ValueError for NaN and infinities, and TypeError for a value that JSON cannot represent.
    """

    def other(item: Any) -> Any:
        if isinstance(item, BaseModel):
            return item.model_dump(mode="json")
        raise TypeError(f"a {type(item).__name__} has no canonical JSON")

    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False, default=other
    )


def digest(value: Any) -> str:
    """Return the SHA-256 of `canonical_json` of ``value``, in hexadecimal."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()
