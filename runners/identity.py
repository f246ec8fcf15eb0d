"""The identity of settings: the part of them that can change a number, whose hash names a run's folder.

Every field of a dataclass of settings belongs to it, so that none can be forgotten. A field that does not always matter
says when it does, with `counts_if`:

    skip_missing: bool = field(default=False, metadata=counts_if(lambda evaluation: evaluation.skip_missing))

Fields that were added after results had been published need it, too: left out while they have their default, they leave
the digests of published results as they are.
"""

import dataclasses
import json
from collections.abc import Callable
from hashlib import sha256
from typing import Any

COUNTS_IF = "counts_if"  # the key of a field's metadata


def counts_if(condition: Callable[[Any], object]) -> dict[str, Any]:
    """Metadata of a field that belongs to the identity only where the condition holds for the object that has it."""
    return {COUNTS_IF: condition}


def identifying_fields(settings: Any) -> list[str]:
    """The names of those fields of a dataclass that belong to its identity."""
    fields = dataclasses.fields(settings)
    return [field.name for field in fields if field.metadata.get(COUNTS_IF, lambda _: True)(settings)]


def identity_of(value: Any) -> Any:
    """`plain`, with those fields alone that belong to the identity."""
    return _as_mappings(value, identifying_fields)


def plain(value: Any) -> Any:
    """Dataclasses as mappings (with the name of their class), all the way down, for JSON and YAML."""
    return _as_mappings(value, lambda settings: [field.name for field in dataclasses.fields(settings)])


def digest_of(identity: dict[str, Any]) -> str:
    """Ten hexadecimal digits of the SHA-256 of an identity, whatever the order of its keys."""
    return sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]


def _as_mappings(value: Any, names: Callable[[Any], list[str]]) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {name: _as_mappings(getattr(value, name), names) for name in names(value)}
        return {"class": type(value).__name__} | fields
    if isinstance(value, dict):
        return {key: _as_mappings(entry, names) for key, entry in value.items()}
    return [_as_mappings(entry, names) for entry in value] if isinstance(value, tuple) else value
