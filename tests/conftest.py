"""A toy to run whole experiments on in seconds: a random OPT with the bundled tokenizer, and texts of a few kilobytes."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # has an effect only before Triton is imported, which transformers may do

from transformers import OPTConfig, OPTForCausalLM

from runners.config.command_line import check
from runners.config.settings import Settings

PROJECT = Path(__file__).parents[1]
SHARED = PROJECT.parent / "shared"
TOKENIZER = PROJECT / "runners" / "tiny"

ToySettings = Callable[..., Settings]


def missing(package: str) -> str:
    """Why a test skips that needs a package of an extra."""
    return f'{package} is not installed: pip install -e ".[dev]"'


def save_toy(folder: Path, layers: int) -> Path:
    """A checkpoint folder: blocks of width 32, context 64, float32, random weights and the bundled tokenizer."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=4096,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    OPTForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    return folder


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy with two blocks."""
    return save_toy(tmp_path_factory.mktemp("models") / "toy", layers=2)


@pytest.fixture
def model_copy(toy_model: Path, tmp_path: Path) -> Path:
    """The toy model in a folder that a test may damage."""
    return Path(shutil.copytree(toy_model, tmp_path / "damaged"))


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All data sets in the layout of a data root, as a few kilobytes of made-up English."""
    root = tmp_path_factory.mktemp("data")
    sentence = "the model reads a weight and its column before it rounds every row to the grid of four bits"
    words = sentence.split()
    for place, (name, split, column) in enumerate(
        [
            ("wikitext2", "train", "text"),
            ("wikitext2", "test", "text"),
            ("c4", "train", "text"),
            ("c4", "validation", "text"),
            ("ptb", "test", "sentence"),
        ]
    ):
        rows = [
            {column: " ".join(words[(place + row * step) % len(words)] for step in range(120))} for row in range(1, 13)
        ]
        write_rows(root / name / f"{split}.jsonl", rows)
    return root


def write_rows(file: Path, rows: list[dict[str, str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def toy_settings(toy_model: Path, data_root: Path, tmp_path: Path) -> ToySettings:
    """Settings of a run on the toy, as the command line would make them; later arguments win."""

    def make(*overrides: str) -> Settings:
        defaults = [
            "model=local",
            f"model.path={toy_model}",
            "calibration=c4",
            "calibration.num_sequences=6",
            "evaluation=wikitext2",
            f"data_root={data_root}",
            f"results={tmp_path / 'results'}",
            "tracker=none",
        ]
        names = {override.split("=")[0] for override in overrides}
        if "calibration=none" in overrides:  # which has no settings
            names.add("calibration.num_sequences")
        kept = [line for line in defaults if line.split("=")[0] not in names]
        return check([*kept, *overrides], multirun=False)[0]

    return make
