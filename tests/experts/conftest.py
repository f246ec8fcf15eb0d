"""Small random models with experts: Qwen3-MoE, Mixtral, and DeepSeek-V3 with its dense first block and shared expert."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TOKENIZER
from tests.family_zoo import small_model

FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3")
MATRICES = 2  # dimensions from which on a parameter is a matrix


def checkpoint(family: str, folder: Path) -> Path:
    """Three blocks in small shards, with the names of the hub: a tensor for each weight of each expert."""
    small_model(family).save_pretrained(folder, max_shard_size="100KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    return folder


def without_tokens(model: Any, block: int, expert: int) -> None:
    """Have no token routed to an expert of a DeepSeek-V3, whose router adds a bias to the scores."""
    model.model.layers[block].mlp.gate.e_score_correction_bias[expert] = -100.0


@pytest.fixture(scope="session", params=FAMILIES)
def experts_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_grad_enabled(False)
    folder = checkpoint(request.param, tmp_path_factory.mktemp("experts") / request.param)
    torch.set_grad_enabled(True)
    return folder
