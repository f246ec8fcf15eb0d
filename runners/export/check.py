"""The perplexity of an export, measured on the windows of the run that it was made from."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from runners.console import progress
from runners.errors import InputError
from runners.evaluation.blockwise import BlockwiseEvaluation
from runners.evaluation.likelihood import perplexity
from runners.models.blocks import InMemoryModel
from runners.run.kept_run import KeptRun
from runners.run.kept_windows import first_windows

ALL = 10**9  # windows


def measured_again(
    kept: KeptRun, folder: Path, layout: str, text: str | None, data_root: str | None
) -> tuple[str, float]:
    """Load an export with transformers and measure it on all windows of a text.

    Args:
        layout: name of the format.
        text: one of the run's texts; None: the first that it has measured.
        data_root: folder of the data sets; None: as in the run.

    Returns:
        The name of the text, and the perplexity.

    Raises:
        InputError: transformers cannot load the folder, or the text is not there.
    """
    name, ids = first_windows(kept, text, ALL, None, data_root)
    source = InMemoryModel(_load(folder, kept.model.dtype))
    evaluation = BlockwiseEvaluation(source, {name: (ids, "")}, batch_size)
    with torch.no_grad(), progress("measure the export", evaluation.steps) as bar:
        losses = evaluation.run(bar)[name]["nll"]
    return name, perplexity(torch.tensor(losses, dtype=torch.float64))


def _load(folder: Path, dtype: str | None) -> Any:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype) if dtype else "auto",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except Exception as error:  # whatever transformers and the packages that it calls raise
        why = " ".join(str(error).split())[:300]
        raise InputError(f"transformers cannot load what was written to {folder}: {why}") from error
    return model.eval().requires_grad_(False)
