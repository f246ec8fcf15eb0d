"""Compose and check every cell of a command line before the first one starts.

Hydra accepts an unknown key behind a plus sign, and answers some mistakes with a traceback; here each gets a sentence.
"""

import copy
import difflib
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runners.config import launchers
from runners.config import resolvers as resolvers  # importing it registers what conf/ interpolates
from runners.config.build import unknown_setting
from runners.config.from_config import settings_from
from runners.config.hydra_internals import overrides_of_cells
from runners.config.settings import Settings
from runners.errors import InputError
from runners.project import CONF
from runners.storage.files import check_writable


@dataclass(frozen=True)
class CommandLine:
    """A command line that is free of mistakes.

    Attributes:
        cells: the settings of every cell, one where nothing is swept.
        composed: the configuration of the one cell, or what the cells of a sweep share, with Hydra's own part.
    """

    cells: list[Settings]
    composed: DictConfig


def check(overrides: Sequence[str], multirun: bool) -> list[Settings]:
    """Compose and check all cells of a command line.

    Raises:
        InputError: the first thing that is wrong, in a sentence.
    """
    with configuration():
        return read(overrides, multirun).cells


def configuration() -> AbstractContextManager[None]:
    """Let Hydra compose from conf/, as long as the context lasts."""
    return initialize_config_dir(str(CONF), version_base="1.3")


def read(overrides: Sequence[str], multirun: bool) -> CommandLine:
    """Compose and check all cells of a command line, within `configuration()`.

    Raises:
        InputError: the first thing that is wrong, in a sentence.
    """
    loader = GlobalHydra.instance().config_loader()
    groups = {str(group): loader.get_group_options(str(group)) for group in loader.list_groups("") if group != "hydra"}
    hydras = {f"hydra/{group}": loader.get_group_options(f"hydra/{group}") for group in loader.list_groups("hydra")}
    parsed = _parse(overrides)
    _check_choices(parsed, groups | hydras)
    command = _read_sweep(parsed, set(groups)) if multirun else _read_single(parsed, set(groups))
    for folder in {cell.study_folder for cell in command.cells if not cell.execution.dry_run}:
        check_writable(folder)
    return command


def _read_single(overrides: list[Override], groups: set[str]) -> CommandLine:
    for override in overrides:
        if override.is_sweep_override():
            raise InputError(f"{override.input_line} names several values: add -m to run them all")
    config = _compose(_choices(overrides, groups), RunMode.RUN)
    _set_values(config, overrides, groups)
    return CommandLine([settings_from(config)], config)


def _read_sweep(overrides: list[Override], groups: set[str]) -> CommandLine:
    fixed = [override for override in overrides if not override.is_sweep_override()]
    shared = _compose(_choices(fixed, groups), RunMode.MULTIRUN)
    swept_by_experiment = [f"{key}={value}" for key, value in (shared.hydra.sweeper.params or {}).items()]
    lines = overrides_of_cells(_parse(swept_by_experiment) + overrides)
    bases: dict[tuple[str, ...], DictConfig] = {}  # by the choices: composing takes long, setting values does not
    cells = [_cell_of_sweep(_parse(cell), groups, bases) for cell in lines]
    _set_values(shared, fixed, groups)
    OmegaConf.update(shared, "hydra.overrides.task", [line for o in overrides if (line := o.input_line)])
    return CommandLine(cells, shared)


def _cell_of_sweep(overrides: list[Override], groups: set[str], bases: dict[tuple[str, ...], DictConfig]) -> Settings:
    choices = tuple(_choices(overrides, groups))
    if choices not in bases:
        bases[choices] = _compose(choices, RunMode.RUN)
    config = copy.deepcopy(bases[choices])
    _set_values(config, overrides, groups)
    return settings_from(config)


def _parse(overrides: Sequence[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise InputError(
            f"{_first_line(error)}: settings are written as name=value, see python run.py --help"
        ) from None


def _check_choices(overrides: list[Override], groups: dict[str, list[str]]) -> None:
    """Every group that is named must have the option that is chosen."""
    for override in overrides:
        options = groups.get(_group(override))
        if options is None or override.is_delete():
            continue
        choices = list(override.sweep_string_iterator()) if override.is_sweep_override() else [str(override.value())]
        for choice in choices:
            if choice not in (*options, "null", "None"):
                close = difflib.get_close_matches(choice, options, n=1)
                hint = f"did you mean {close[0]}? There are" if close else "there are"
                raise InputError(f"there is no {override.key_or_group}={choice}: {hint} {', '.join(options)}")
            if override.key_or_group == launchers.GROUP:
                launchers.check_installed(choice)


def _choices(overrides: list[Override], groups: set[str]) -> list[str]:
    """The overrides that only a composition can follow: the choice of a group's option, and all of Hydra's own."""
    return [o.input_line for o in overrides if (_group(o) in groups or _is_hydras(o)) and o.input_line]


def _set_values(config: DictConfig, overrides: list[Override], groups: set[str]) -> None:
    """Set, in a composed configuration, what the other overrides ask for."""
    for override in overrides:
        name = override.key_or_group
        if _group(override) in groups or _is_hydras(override):
            continue
        if override.is_delete():
            raise InputError(f"~{name}: settings cannot be taken away, only set")
        _check_key(config, name)
        OmegaConf.update(config, name, override.value())


def _is_hydras(override: Override) -> bool:
    return re.match(r"hydra[./]", override.key_or_group) is not None


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


def _compose(overrides: Sequence[str], mode: RunMode) -> DictConfig:
    """`hydra.compose`, which keeps Hydra's own part, and knows sweeps."""
    loader = GlobalHydra.instance().config_loader()
    try:
        return loader.load_configuration("config", list(overrides), run_mode=mode, from_shell=False)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(_first_line(error)) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".:")
