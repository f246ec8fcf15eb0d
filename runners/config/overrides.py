"""Settings as they are typed, `name=value`: read by Hydra's grammar, checked, and listed where they are swept.

Hydra accepts an unknown key behind a plus sign, and answers some mistakes with a traceback; here each gets a sentence.
"""

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runners.config import launchers
from runners.config.build import unknown_setting
from runners.config.hydra_internals import MAX_VALUES, glob_of, overrides_parser
from runners.errors import InputError, known_names
from runners.quoting import setting

Groups = Mapping[str, Sequence[str]]  # the options of every conf group


def parse(lines: Sequence[str], multirun: bool, groups: Groups) -> list[Override]:
    """Read settings and check the choices among them. Each sweep becomes the list of its values: `seed=0,2,4`.

    The list is made once, because `shuffle` would give another one to whoever reads the setting again.

    Raises:
        InputError: a setting cannot be read, chooses an option that its group lacks, or sweeps without `-m`.
    """
    _check_commas(lines)
    parser = overrides_parser()
    parsed = [_listed(_read(parser, line), parser, multirun, groups) for line in lines]
    _check_choices(parsed, groups)
    return parsed


def is_hydras(override: Override) -> bool:
    """Whether it sets something of Hydra's own, such as the launcher."""
    return re.match(r"hydra[./]", override.key_or_group) is not None


def is_choice(override: Override, groups: Groups) -> bool:
    """Whether it chooses an option of a conf group. Only a composition can follow such a choice."""
    return _group(override) in groups


def set_values(config: DictConfig, overrides: Sequence[Override], groups: Groups) -> None:
    """Set, in a composed configuration, the values of the settings that are neither a choice nor Hydra's own.

    Raises:
        InputError: there is no such setting, or its value has an interpolation that cannot be read.
    """
    for override in overrides:
        name = override.key_or_group
        if is_choice(override, groups) or is_hydras(override):
            continue
        if override.is_delete():
            raise InputError(f"~{name}: settings cannot be taken away, only set")
        if override.package is not None or not name:
            raise InputError(f"{override.input_line!r} is not a setting: settings are written as name=value")
        _check_key(config, name)
        try:
            OmegaConf.update(config, name, override.value())
        except OmegaConfBaseException as error:
            raise InputError(f"{override.input_line}: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """The first line of an error of Hydra or OmegaConf: the others are links and the state of their parsers."""
    return str(error).strip().split("\n")[0].rstrip(".:")


def _check_commas(lines: Sequence[str]) -> None:
    """A space beside a comma, as in `bits=3, 4`, makes several words of a list."""
    for place, line in enumerate(lines):
        rest = list(itertools.takewhile(lambda word: "=" not in word, lines[place + 1 :]))
        if "=" in line and rest and (line.endswith(",") or rest[0].startswith(",")):
            words = [line, *rest]
            raise InputError(f"{' '.join(words)} is {len(words)} words: write a list without spaces, {''.join(words)}")


def _read(parser: OverridesParser, line: str) -> Override:
    try:
        return parser.parse_overrides([line])[0]
    except HydraException as error:
        raise InputError(_unreadable(line, error)) from None


def _unreadable(line: str, error: HydraException) -> str:
    name, equals, value = line.partition("=")
    how = "settings are written as name=value"
    if not equals or not re.fullmatch(r"[~+]*[\w./@$-]+", name):
        return f"{line!r} is not a setting: {how}, see python run.py --help"
    if re.match(r"\w+\(", value):  # a function of Hydra's: its error tells which argument is wrong
        reason = str(error).strip().split("\n")[1:2] or [first_line(error)]
        return f"{line} cannot be read ({reason[0].strip()}): {how}, see python run.py --help"
    text = os.path.expanduser(value)  # between quotes no shell does this
    return (
        f"{line} cannot be read: {how}, and a text with brackets, quotes, commas, =, # or letters beyond ASCII in "
        f"quotes of its own: {setting(name, text)}"
    )


def _listed(override: Override, parser: OverridesParser, multirun: bool, groups: Groups) -> Override:
    """A sweep as the list of its values; any other setting as it is."""
    if not override.is_sweep_override():
        return override
    line = override.input_line
    if is_hydras(override):
        raise InputError(f"{line}: a setting of Hydra's own has one value")
    if not multirun:
        text = override.get_value_string()
        single = f", or write one text with a comma as {setting(override.key_or_group, text)}" if "/" in text else ""
        raise InputError(f"{line} names several values: add -m to run them all{single}")
    values = list(itertools.islice(_values(override, groups), MAX_VALUES + 1))
    if not values:
        options = f": {known_names('', groups[_group(override)])}" if is_choice(override, groups) else ""
        raise InputError(f"{line} names no value{options}")
    if len(values) > MAX_VALUES:
        raise InputError(f"{line} names more than {MAX_VALUES:,} values")
    return parser.parse_overrides([f"{override.get_key_element()}={','.join(values)}"])[0]


def _values(override: Override, groups: Groups) -> Iterator[str]:
    if (glob := glob_of(override)) is not None:
        if not is_choice(override, groups):
            raise InputError(f"{override.input_line}: glob chooses among the files of a group, as method=glob(gptq*)")
        return iter(glob.filter(list(groups[_group(override)])))
    if not override.is_discrete_sweep():
        raise InputError(f"{override.input_line} has no list of values: use a,b or range(start,stop,step)")
    try:
        return override.sweep_string_iterator()
    except (HydraException, ValueError) as error:  # a step of 0
        raise InputError(f"{override.input_line}: {first_line(error)}") from None


def _check_choices(overrides: Sequence[Override], groups: Groups) -> None:
    """Every group that is named must have the options that are chosen."""
    for override in overrides:
        options = groups.get(_group(override))
        if options is None or override.is_delete():
            continue
        choices = list(override.sweep_string_iterator()) if override.is_sweep_override() else [str(override.value())]
        for choice in choices:
            if choice not in options:
                raise InputError(f"there is no {override.key_or_group}={choice}: {known_names(choice, options)}")
            if override.key_or_group == launchers.GROUP:
                launchers.check_installed(choice)


def _group(override: Override) -> str:
    return override.key_or_group.split("@")[0]


def _check_key(base: DictConfig, name: str) -> None:
    node: Any = base
    for depth, part in enumerate(name.split(".")):
        if not isinstance(node, DictConfig) or part not in node.keys():  # noqa: SIM118 - `in` is false for a missing value
            known = [str(key) for key in node] if isinstance(node, DictConfig) else []
            where = ".".join(name.split(".")[:depth])
            raise unknown_setting(where, part, [key for key in known if key not in ("_target_", "hydra")])
        node = node._get_node(part)
