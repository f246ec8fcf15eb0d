"""The perplexity of an export, measured on the windows of the run that it was made from."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from runners.console import progress
from runners.errors import InputError
from runners.evaluation.blockwise import BlockwiseEvaluation
from runners.evaluation.likelihood import perplexity
from runners.export.card import Check
from runners.kept.run import KeptRun
from runners.kept.windows import first_windows
from runners.models.blocks import BlockSource, InMemoryModel
from runners.models.checkpoint import from_files, open_checkpoint
from runners.models.streaming import open_model
from runners.results import metrics

ALL = 10**9  # windows
TRANSFORMERS, OWN = "transformers", "method=stored"  # what reads an export again


def checked(
    kept: KeptRun,
    folder: Path,
    layout: str,
    device: torch.device,
    batch_size: int,
    *,
    text: str | None,
    data_root: str | None,
) -> Check:
    """Load an export again and measure it on all windows of a text.

    transformers reads it where it can; this project's own reader where the layout needs a package that is not installed, or
    layers are on unlike grids, which transformers does not tell apart (5.24, `CompressedTensorsDequantize`).

    Args:
        layout: name of the format.
        batch_size: windows that go through the model together; that of the run gives the same last digits.
        text: one of the run's texts; None: the first that it has measured.
        data_root: folder of the data sets; None: as in the run.

    Raises:
        InputError: the folder cannot be loaded, or the text is not there.
    """
    name, ids = first_windows(kept, text, ALL, None, data_root)
    if metrics.ppl(name) not in kept.metrics:
        raise InputError(f"the run has no perplexity on {name} to compare with: name another text, or check=false")
    by_transformers = layout == "dense" or (
        layout == "compressed_tensors" and find_spec("compressed_tensors") and _is_of_one_grid(folder)
    )
    source = _by_transformers(folder, kept, device) if by_transformers else _by_this_project(folder, kept, device)
    evaluation = BlockwiseEvaluation(source, {name: (ids, "")}, batch_size)
    with torch.no_grad(), progress("measure the export", evaluation.steps) as bar:
        losses = evaluation.run(bar)[name]["nll"]
    after = perplexity(torch.tensor(losses, dtype=torch.float64))
    return Check(name, kept.metrics[metrics.ppl(name)], after, TRANSFORMERS if by_transformers else OWN)


def _is_of_one_grid(folder: Path) -> bool:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return len(config["quantization_config"]["config_groups"]) == 1


def _by_this_project(folder: Path, kept: KeptRun, device: torch.device) -> BlockSource:
    model = replace(kept.model, path=str(folder.absolute()), revision=None)
    return open_model(open_checkpoint(model, stored=True), model, device)


def _by_transformers(folder: Path, kept: KeptRun, device: torch.device) -> BlockSource:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        model, _ = from_files(folder, kept.model.dtype)
    except Exception as error:  # whatever transformers and the packages that it calls raise
        why = " ".join(str(error).split())[:300]
        raise InputError(f"transformers cannot load what was written to {folder}: {why}") from error
    return InMemoryModel(model.to(device).eval().requires_grad_(False))
