"""Compose and check every cell of a command line before the first one starts."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from runners.config import resolvers as resolvers  # importing it registers what conf/ interpolates
from runners.config.from_config import settings_from
from runners.config.hydra_internals import also_compose_from, groups_inside, options_of_group, overrides_of_cells
from runners.config.overrides import Groups, first_line, is_choice, is_hydras, parse, set_values
from runners.config.settings import Settings
from runners.errors import InputError
from runners.project import CONF
from runners.storage.files import check_writable

MOST_MISTAKES = 10  # of the cells of a sweep: whoever has read so many looks at the command again


@dataclass(frozen=True)
class CommandLine:
    """A command line that is free of mistakes.

    Attributes:
        cells: the settings of every cell, one where nothing is swept.
        composed: the configuration of the one cell, or what the cells of a sweep share, with Hydra's own part.
        words: the settings as they were typed.
    """

    cells: list[Settings]
    composed: DictConfig
    words: tuple[str, ...] = ()


def check(overrides: Sequence[str], multirun: bool) -> list[Settings]:
    """Compose and check all cells of a command line.

    Raises:
        InputError: the first thing that is wrong, in a sentence.
    """
    with configuration():
        return read(overrides, multirun).cells


@contextmanager
def configuration(more: str | None = None) -> Iterator[None]:
    """Let Hydra compose from conf/, as long as the context lasts.

    Args:
        more: a folder with conf groups of the user's own, such as method/mine.yaml (Hydra's --config-dir).

    Raises:
        InputError: there is no such folder, or it has a file that conf/ has, too.
    """
    folder = _checked_folder(more) if more is not None else None
    with initialize_config_dir(str(CONF), version_base="1.3"):
        if folder is not None:
            also_compose_from(folder)
        yield


def _checked_folder(more: str) -> Path:
    folder = Path(more).resolve()
    if not folder.is_dir():
        raise InputError(f"--config-dir {more} is not a folder: it takes one with conf groups, as method/mine.yaml")
    files = sorted(file.relative_to(folder) for file in folder.rglob("*.yaml"))
    for file in files:
        if (CONF / file).exists():  # Hydra would read ours, and say nothing
            raise InputError(f"{folder / file} has the name of a file in conf/, which would be read instead: rename it")
    if not any(file.parent != Path() for file in files):
        raise InputError(f"--config-dir {more} holds no file of a conf group, such as method/mine.yaml")
    return folder


def read(lines: Sequence[str], multirun: bool) -> CommandLine:
    """Compose and check all cells of a command line, within `configuration()`.

    Raises:
        InputError: the first thing that is wrong, in a sentence.
    """
    ours, hydras = _groups()
    parsed = parse(lines, multirun, ours | hydras)
    command = _read_sweep(parsed, ours, hydras) if multirun else _read_single(parsed, ours)
    for folder in {cell.study_folder for cell in command.cells if not cell.execution.dry_run}:
        check_writable(folder)
    return replace(command, words=tuple(lines))


def check_names(lines: Sequence[str], multirun: bool) -> None:
    """Check that every setting and every choice exists, within `configuration()`; values may be wrong or missing.

    Raises:
        InputError: the first that does not exist.
    """
    ours, hydras = _groups()
    fixed = [override for override in parse(lines, multirun, ours | hydras) if not override.is_sweep_override()]
    set_values(_compose(_choices(fixed, ours), RunMode.RUN), fixed, ours)


def _groups() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The options of every conf group: ours, and those of Hydra, such as `hydra/launcher`."""
    ours = {group: options_of_group(group) for group in groups_inside("") if group != "hydra"}
    hydras = {f"hydra/{group}": options_of_group(f"hydra/{group}") for group in groups_inside("hydra")}
    return ours, hydras


def _read_single(overrides: list[Override], groups: Groups) -> CommandLine:
    config = _compose(_choices(overrides, groups), RunMode.RUN)
    set_values(config, overrides, groups)
    return CommandLine([settings_from(config)], config)


def _read_sweep(overrides: list[Override], ours: Groups, hydras: Groups) -> CommandLine:
    """The cells of a sweep. What an experiment sweeps comes first, so that the command line replaces it."""
    fixed = [override for override in overrides if not override.is_sweep_override()]
    shared = _compose(_choices(fixed, ours), RunMode.MULTIRUN)
    by_experiment = [f"{key}={value}" for key, value in (shared.hydra.sweeper.params or {}).items()]
    swept = parse(by_experiment, True, {**ours, **hydras}) + overrides
    bases: dict[tuple[str, ...], DictConfig] = {}  # by the choices: composing takes long, setting values does not
    cells = _cells_of_sweep(overrides_of_cells(swept), ours, bases)
    set_values(shared, fixed, ours)
    # Hydra's sweeper, which starts the cells, reads the same lists of values.
    OmegaConf.update(shared, "hydra.sweeper.params", None)
    OmegaConf.update(shared, "hydra.overrides.task", [line for o in swept if (line := o.input_line)])
    return CommandLine(cells, shared)


def _cells_of_sweep(
    lines: Iterable[Sequence[str]], groups: Groups, bases: dict[tuple[str, ...], DictConfig]
) -> list[Settings]:
    """The settings of all cells.

    Raises:
        InputError: the first setting that cannot be set; or what is wrong with the cells, each mistake once however many
            have it.
    """
    cells: list[Settings] = []
    mistakes: dict[str, None] = {}
    for line in lines:
        config = _config_of_cell(parse(line, False, groups), groups, bases)
        try:
            cells.append(settings_from(config))
        except InputError as error:
            mistakes[str(error)] = None
            if len(mistakes) == MOST_MISTAKES:
                break
    if mistakes:
        raise InputError("\n".join(mistakes))
    return cells


def _config_of_cell(overrides: list[Override], groups: Groups, bases: dict[tuple[str, ...], DictConfig]) -> DictConfig:
    choices = tuple(_choices(overrides, groups))
    if choices not in bases:
        composed = _compose(choices, RunMode.RUN)
        with open_dict(composed):
            del composed["hydra"]  # no setting of a cell, and the larger part: it would be copied for every cell
        bases[choices] = composed
    config = copy.deepcopy(bases[choices])
    set_values(config, overrides, groups)
    return config


def _choices(overrides: list[Override], groups: Groups) -> list[str]:
    """The overrides that only a composition can follow: the choice of a group's option, and all of Hydra's own."""
    return [o.input_line for o in overrides if (is_choice(o, groups) or is_hydras(o)) and o.input_line]


def _compose(overrides: Sequence[str], mode: RunMode) -> DictConfig:
    """`hydra.compose`, but with Hydra's own part, and for sweeps as well."""
    loader = GlobalHydra.instance().config_loader()
    try:
        return loader.load_configuration("config", list(overrides), run_mode=mode, from_shell=False)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(first_line(error)) from None
