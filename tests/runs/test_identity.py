"""The digests of committed results: what the settings of today's code come to must still be what the folders are called."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import yaml

from baselines.awq import AWQ
from baselines.gptq import GPTQ
from baselines.rtn import RTN
from baselines.spqr import SpQR
from quantease.coordinate_descent import QuantEase
from quantease.outliers import OutlierQuantEase
from runners.config.build import plain
from runners.config.settings import Method, Settings, Tracker
from runners.data.calibration import Calibration
from runners.data.datasets import HubDataset, StandardLibrary
from runners.data.windows import Evaluation, Text
from runners.models.checkpoint import Model
from runners.project import ROOT

CLASSES = (AWQ, GPTQ, RTN, SpQR, OutlierQuantEase, QuantEase, HubDataset, StandardLibrary)
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
    return Settings(**{key: rebuilt(entry) for key, entry in stored.items() if key not in ("class", "grid", "data")})


@pytest.mark.parametrize("file", RUNS, ids=lambda file: file.parent.name)
def test_a_committed_run_keeps_its_digest(file: Path) -> None:
    stored = yaml.safe_load(file.read_text(encoding="utf-8"))
    settings = settings_of(stored)
    # The bundled model is here, the texts of the Python that made the run need not be.
    identity = settings.identity() | {"data": stored["data"]}
    identity["model"]["path"] = stored["model"]["path"]
    digest = sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]
    assert file.parent.name == f"{settings.method.name}{f'-{settings.bits}b' * settings.quantizes}-{digest}"
    assert plain(settings.grid) == stored.get("grid", plain(settings.grid))


def test_there_are_runs_to_test_that_on() -> None:
    assert len(RUNS) > 100
