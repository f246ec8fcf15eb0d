"""The digests of committed results: what the settings of today's code come to must still be what the folders are called."""

from dataclasses import field, fields, make_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from baselines.admm_q import ADMMQ
from baselines.awq import AWQ
from baselines.cdquant import CDQuant
from baselines.foem import FOEM
from baselines.gptaq import GPTAQ
from baselines.gptq import GPTQ
from baselines.k_babai import KBabai
from baselines.ldlqrg import LDLQGreedy
from baselines.qep import CorrectedTarget
from baselines.qronos import Qronos
from baselines.rtn import RTN
from baselines.spqr import SpQR
from baselines.transforms.magr import MagR
from quantease.coordinate_descent import QuantEase
from quantease.outliers import OutlierQuantEase
from quantease.transform import Transformed
from runners.config.execution import Execution, Tracker
from runners.config.run import Method, Run
from runners.config.settings import RUN_SETTINGS, Settings
from runners.data.calibration import Calibration
from runners.data.datasets import HubDataset, StandardLibrary
from runners.data.windows import Evaluation, Text
from runners.identity import digest_of
from runners.models.checkpoint import Model
from runners.project import ROOT
from tests.conftest import ToySettings

CLASSES = (AWQ, GPTQ, RTN, SpQR, OutlierQuantEase, QuantEase, HubDataset, StandardLibrary)
CLASSES += (ADMMQ, CDQuant, FOEM, GPTAQ, KBabai, LDLQGreedy, CorrectedTarget, Qronos, MagR, Transformed)
CLASSES += (Calibration, Evaluation, Method, Model, Text, Tracker)
BY_NAME = {cls.__name__: cls for cls in CLASSES}
RUNS = sorted((ROOT / "results" / "tiny").glob("*/*-*/config.yaml"))


def rebuilt(node: Any) -> Any:
    """What `plain` has written, as the objects it was written from."""
    if isinstance(node, dict):
        fields = {key: rebuilt(entry) for key, entry in node.items() if key != "class"}
        return BY_NAME[node["class"]](**fields) if "class" in node else fields
    return tuple(map(rebuilt, node)) if isinstance(node, list) else node


def settings_of(stored: dict[str, Any]) -> Settings:
    flat = {key: rebuilt(entry) for key, entry in stored.items() if key not in ("class", "grid", "data")}
    run = Run(**{name: flat.pop(name) for name in RUN_SETTINGS if name in flat})
    return Settings(run, Execution(**flat))


@pytest.mark.parametrize("file", RUNS, ids=lambda file: file.parent.name)
def test_a_committed_run_keeps_its_digest(file: Path) -> None:
    stored = yaml.safe_load(file.read_text(encoding="utf-8"))
    settings = settings_of(stored)
    # The bundled model is here, the texts of the Python that made the run need not be.
    identity = settings.identity() | {"data": stored["data"]}
    identity["model"]["path"] = stored["model"]["path"]
    digest = digest_of(identity)
    assert file.parent.name == f"{settings.run.method.name}{f'-{settings.run.bits}b' * settings.run.quantizes}-{digest}"
    assert identity.get("grid") == stored.get("grid")


def test_there_are_runs_to_test_that_on() -> None:
    assert len(RUNS) > 100


def test_a_field_added_to_run_changes_the_digest_and_one_added_to_execution_does_not(toy_settings: ToySettings) -> None:
    settings = toy_settings()
    longer = {
        half: make_dataclass(half.__name__, [("added", int, field(default=1))], bases=(half,), frozen=True)
        for half in (Run, Execution)
    }
    run = longer[Run](**vars(settings.run))
    execution = longer[Execution](**vars(settings.execution))
    assert Settings(run, settings.execution).digest != settings.digest
    assert Settings(run, settings.execution).digest != Settings(replace(run, added=2), settings.execution).digest
    assert Settings(settings.run, execution).digest == settings.digest


def test_what_belongs_to_a_run_does_not_touch_how_it_is_executed(toy_settings: ToySettings) -> None:
    settings = toy_settings()
    changed = settings.replace(bits=4, force=True)
    assert (changed.run.bits, changed.execution.force) == (4, True)
    assert changed.replace(bits=settings.run.bits, force=False) == settings
    with pytest.raises(TypeError, match="no_such_setting"):
        settings.replace(no_such_setting=1)


def test_the_record_of_a_run_has_every_setting_in_the_published_order(toy_settings: ToySettings) -> None:
    names = ["class", *(field.name for half in (Run, Execution) for field in fields(half)), "grid", "data"]
    resolved = list(toy_settings().resolved())
    assert sorted(resolved) == sorted(names)
    stored = yaml.safe_load(next(file for file in RUNS if "rtn" in str(file)).read_text(encoding="utf-8"))
    assert [name for name in resolved if name in stored] == list(stored)  # younger settings are at their places
