"""Turn a node of the configuration into the dataclass that it describes, or refuse it in a sentence.

`_target_` may only name a dataclass of this project: a configuration builds settings, it does not run code.
"""

import dataclasses
import importlib
import json
import types
import typing
from typing import Any

from runners.errors import InputError, known_names

PACKAGES = ("quantease", "baselines", "runners")  # the only ones that `_target_` may name
LEAVES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def build(annotation: Any, value: Any, where: str) -> Any:
    """Make `value`, as it came out of YAML, into an instance of `annotation`.

    Mappings become dataclasses: the one that `_target_` names, else the annotation itself.

    Args:
        annotation: a dataclass, a protocol, int, float, bool, str, a dict or a tuple of those, or a union of them with
            None.
        where: the node's key in the configuration, for messages; "" for the whole.

    Raises:
        InputError: naming the key that is unknown, missing, of the wrong type or out of range.
    """
    options = _options(annotation)
    if value is None and type(None) in options:
        return None
    classes = [option for option in options if option is not type(None)]
    kind = typing.get_origin(classes[0]) or classes[0]
    if isinstance(value, dict) and kind is dict:
        return _mapping(classes[0], value, where)
    if isinstance(value, list) and kind is tuple:
        return _sequence(classes[0], value, where)
    if isinstance(value, dict) and kind not in (*LEAVES, tuple):
        return _construct(_class_to_build(classes, value, where), _fields(value), where)
    # Of several kinds of single values (true or a text) the one that it is.
    return _leaf(
        next((option for option in classes if option in LEAVES and type(value) is option), classes[0]), value, where
    )


def _options(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; for any other annotation, that annotation alone."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _mapping(annotation: Any, value: dict[Any, Any], where: str) -> dict[str, Any]:
    """A value of type `dict[str, item]`, whose keys the configuration chooses freely, such as the names of texts."""
    _, item = typing.get_args(annotation)
    return {str(key): build(item, entry, f"{where}.{key}") for key, entry in value.items()}


def _sequence(annotation: Any, value: list[Any], where: str) -> tuple[Any, ...]:
    """A value of type `tuple[item, ...]`: YAML has lists only, but a frozen dataclass must be hashable."""
    item = typing.get_args(annotation)[0]
    return tuple(build(item, entry, f"{where}[{place}]") for place, entry in enumerate(value))


def _class_to_build(classes: list[Any], value: dict[Any, Any], where: str) -> Any:
    """The class that `_target_` names, or the first one of the annotation where there is no `_target_`."""
    target = value.get("_target_")
    return _locate(target, where, *classes) if target else classes[0]


def unknown_setting(where: str, key: str, known: list[str]) -> InputError:
    """The error for a key that does not exist, with the one that was probably meant.

    Args:
        where: the mapping that lacks the key; "" for the whole configuration.
        known: the keys that it has.
    """
    name = f"{where}.{key}" if where else key
    return InputError(f"there is no setting {name}: {known_names(key, known)}")


def _construct(cls: Any, values: dict[str, Any], where: str) -> Any:
    """An instance of a dataclass; its own checks raise ValueError with a message that begins with the field's name."""
    if not dataclasses.is_dataclass(cls):
        raise InputError(f"{where} needs a _target_ that says which class to build")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if "name" not in fields:
        # A method's file has a name in addition to its solver's fields. As the `init` of another method it needs none.
        values = {key: entry for key, entry in values.items() if key != "name"}
    for key in values:
        if key not in fields:
            raise unknown_setting(where, key, list(fields))
    prefix = f"{where}." if where else ""
    hints = typing.get_type_hints(cls)
    built = {key: build(hints[key], entry, prefix + key) for key, entry in values.items()}
    for key, field in fields.items():
        if key not in built and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise InputError(f"{prefix}{key} is missing: its file in conf/ must set it")
    try:
        return typing.cast(Any, cls)(**built)
    except ValueError as error:
        raise InputError(f"{prefix}{error}") from None


def _leaf(annotation: Any, value: Any, where: str) -> Any:
    """A single value of the right type. Whole numbers pass for floats; nothing else is converted, as that hides mistakes."""
    if dataclasses.is_dataclass(annotation) and isinstance(value, typing.cast(type, annotation)):
        return value  # built already
    if annotation is float and type(value) is int:
        return float(value)
    if annotation in LEAVES and type(value) is annotation:
        return value
    is_tuple = typing.get_origin(annotation) is tuple
    compound = "a list" if is_tuple else "a mapping that says with _target_ which class to build"
    expected = LEAVES.get(annotation, compound)
    raise InputError(f"{where} must be {expected}, not {json.dumps(value, default=str)}")


def _fields(value: dict[Any, Any]) -> dict[str, Any]:
    """A node without the name of its class."""
    return {str(key): entry for key, entry in value.items() if key != "_target_"}


def _locate(target: Any, where: str, *wanted: Any) -> Any:
    """The class that `_target_` names: a dataclass that is one of those wanted, or has the members of a wanted protocol.

    The name is checked before anything is imported, because importing a module runs its code.
    """
    module, _, name = str(target).rpartition(".")
    if module.split(".")[0] not in PACKAGES or not all(part.isidentifier() for part in str(target).split(".")):
        raise InputError(f"{where}._target_ is {target!r}: only classes of {', '.join(PACKAGES)} may be built")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"{where}._target_ is {target!r}, which does not exist ({error})") from None
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise InputError(f"{where}._target_ is {target!r}, which is not a dataclass")
    if not any(_is_a(cls, option) for option in wanted):
        names = " or ".join(option.__name__ for option in wanted)
        raise InputError(f"{where}._target_ is {target!r}, which is not a {names}")
    return cls


def _is_a(cls: type, wanted: Any) -> bool:
    """`issubclass`; for a protocol, whether the class has all its members. `issubclass` refuses protocols with data."""
    if getattr(wanted, "_is_protocol", False):
        members = {name: member for name, member in vars(wanted).items() if not name.startswith("_")}
        methods = [name for name, member in members.items() if callable(member)]
        return all(hasattr(cls, name) for name in members) and all(callable(getattr(cls, name)) for name in methods)
    return isinstance(wanted, type) and issubclass(cls, wanted)
