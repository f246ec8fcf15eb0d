"""A finished run with its quantized weights, made once: RTN at 2 bits on a toy whose predictions are not even."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import OPTForCausalLM

from runners.config.command_line import check
from runners.run.experiment import run_cell

MakeRun = Callable[..., Path]


@pytest.fixture(scope="session")
def sharp_model(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy with larger matrices, so that quantizing them matters."""
    folder = Path(shutil.copytree(toy_model, tmp_path_factory.mktemp("sharp") / "sharp"))
    model = OPTForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 6 if parameter.ndim == 2 else 1
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_run(sharp_model: Path, data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """Makes a run and returns its folder; every call has results of its own."""

    def make(*overrides: str) -> Path:
        defaults = [
            "model=local",
            f"model.path={sharp_model}",
            "method=rtn",
            "bits=2",
            "calibration=c4",
            "calibration.num_sequences=6",
            "evaluation=wikitext2",
            f"data_root={data_root}",
            f"results={tmp_path_factory.mktemp('results')}",
            "tracker=none",
            "device=cpu",
            "keep_checkpoint=true",
        ]
        names = {override.split("=")[0] for override in overrides}
        kept = [line for line in defaults if line.split("=")[0] not in names]
        (settings,) = check([*kept, *overrides], multirun=False)
        assert run_cell(settings)["status"] == "done"
        return settings.folder

    return make


@pytest.fixture(scope="session")
def kept_run(make_run: MakeRun) -> Path:
    """The run; not to be changed."""
    return make_run()


@pytest.fixture
def run_copy(kept_run: Path, tmp_path: Path) -> Path:
    """The run in a folder that a test may damage or write to."""
    return Path(shutil.copytree(kept_run, tmp_path / kept_run.name))
