"""Models that are never whole in memory: the same numbers from one block at a time."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, OPTConfig

from baselines.rtn import RTN
from quantease.grid import GridSpec
from runners.data.token_ids import ids_hash
from runners.evaluation.blockwise import BlockwiseEvaluation
from runners.models.blocks import InMemoryModel, decoder_blocks
from runners.models.checkpoint import Model, load, open_checkpoint
from runners.models.streaming import StreamedModel, open_model
from runners.quantization.finished_blocks import FinishedBlocks
from tests.conftest import PROJECT
from tests.families import FAMILIES, random_ids, random_model
from tests.quantize import quantize

CPU = torch.device("cpu")


def saved(model: Any, folder: Path) -> Model:
    model.save_pretrained(folder, max_shard_size="20KB")
    return Model("random", str(folder))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_the_one_that_transformers_loads(family: str, dtype: str | None, tmp_path: Path) -> None:
    saved(random_model(family), tmp_path)
    model = Model("random", str(tmp_path), dtype=dtype)
    checkpoint = open_checkpoint(model)
    source = open_model(checkpoint, model, CPU)
    assert isinstance(source, StreamedModel)
    expected: Any = load(checkpoint, model, CPU)
    weights = expected.state_dict()
    for index, theirs in enumerate(decoder_blocks(expected)):
        assert all(parameter.is_meta for parameter in source.blocks[index].parameters())
        with source.open_block(index) as block:
            assert block.state_dict().keys() == theirs.state_dict().keys()
            for name, weight in theirs.state_dict().items():
                assert torch.equal(block.state_dict()[name], weight), name
                assert block.state_dict()[name].dtype == weight.dtype
        assert all(parameter.is_meta for parameter in source.blocks[index].parameters())
    outside = {name: weight for name, weight in source.model.state_dict().items() if not weight.is_meta}
    assert len(outside) >= 3
    assert all(torch.equal(weight, weights[name]) for name, weight in outside.items())
    for (name, mine), (_, theirs) in zip(source.model.named_buffers(), expected.named_buffers(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("family", ["opt", "bloom", "gpt2", "llama"])
def test_a_checkpoint_of_the_base_model_is_read_too(family: str, tmp_path: Path) -> None:
    """As the hub has it for BLOOM and GPT-2: the names lack the prefix of the base model."""
    model = random_model(family)
    model.config.tie_word_embeddings = True
    config, prefix = model.config, f"{model.base_model_prefix}."
    config.architectures = [type(model).__name__]
    config.save_pretrained(tmp_path)
    weights = {
        name.removeprefix(prefix): weight for name, weight in model.state_dict().items() if "lm_head" not in name
    }
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    settings = Model("base", str(tmp_path))
    source = open_model(open_checkpoint(settings), settings, CPU)
    assert isinstance(source, StreamedModel)
    with source.open_block(1) as block:
        theirs = decoder_blocks(model)[1].state_dict()
        assert all(torch.equal(weight, theirs[name]) for name, weight in block.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_and_whole_models_give_the_same(family: str, tmp_path: Path) -> None:
    whole, ids = random_model(family), random_ids(5)
    settings = saved(whole, tmp_path / "model")
    source = open_model(open_checkpoint(settings), settings, CPU)
    blocks = FinishedBlocks(tmp_path, {})
    records = quantize(source, random_ids(3), 2, RTN(), GridSpec(3), finished=blocks)
    expected = quantize(InMemoryModel(whole), random_ids(3), 2, RTN(), GridSpec(3))
    assert [(r.block, r.layer, r.relative_error) for r in records] == [
        (r.block, r.layer, r.relative_error) for r in expected
    ]
    texts = {"text": (ids, ids_hash(ids))}
    streamed = BlockwiseEvaluation(source, texts, 2, blocks=blocks).run()
    assert streamed == BlockwiseEvaluation(InMemoryModel(whole), texts, 2).run()


OTHER_NAMES = "model.decoder.layers.0.fc1.weight"


def test_names_that_only_transformers_knows_are_loaded_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model("opt")
    settings = saved(model, tmp_path)
    checkpoint = open_checkpoint(settings)
    monkeypatch.setattr("runners.models.streaming.unmatched_weights", lambda *_: [OTHER_NAMES])
    source = open_model(checkpoint, settings, CPU)
    assert not isinstance(source, StreamedModel)
    with source.open_block(0) as block:
        block.get_parameter("fc1.weight").zero_()
    with source.open_block(0) as block:  # what was written is lost, as it is where blocks are read anew
        assert torch.equal(block.get_parameter("fc1.weight"), decoder_blocks(model)[0].get_parameter("fc1.weight"))


def opt_folder(
    folder: Path, layers: int, width: int, vocabulary: int, dtype: torch.dtype, positions: int = 128
) -> Path:
    """A random OPT written block by block, one shard a block, so that it is never whole in memory here either."""
    config = OPTConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        dtype=dtype,
    )
    config.architectures = ["OPTForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config).state_dict()
    by_shard: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in shapes.items():
        if name != "lm_head.weight":
            shard = name.split(".layers.")[1].split(".")[0] if ".layers." in name else "outside"
            by_shard.setdefault(f"model-{shard}.safetensors", {})[name] = tensor.shape
    index: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    noise = torch.empty(2**22).normal_(0, 0.02, generator=generator).to(dtype)
    for shard, tensors in by_shard.items():
        weights = {name: _repeated(noise, shape, name) for name, shape in tensors.items()}
        save_file(weights, folder / shard, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((PROJECT / "runners" / "tiny" / name).read_bytes())
    return folder


def _repeated(noise: torch.Tensor, shape: torch.Size, name: str) -> torch.Tensor:
    if "layer_norm" in name:
        return torch.full(shape, float(name.endswith("weight")), dtype=noise.dtype)
    copies = -(-shape.numel() // len(noise))
    return noise.roll(len(name)).repeat(copies)[: shape.numel()].reshape(shape)


def run_capped(folder: Path, results: Path, *overrides: str, limit: int | None = None) -> dict[str, Any]:
    """A run on its own, in a process that may take no more than `limit` bytes."""

    def cap() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    command = [sys.executable, "run.py", "model=local", f"model.path={folder}", "method=rtn", f"results={results}"]
    command += ["calibration=stdlib", "calibration.num_sequences=4", "calibration.held_out=0", "tracker=none"]
    command += ["evaluation=stdlib_docs", "evaluation.texts.stdlib_docs.max_windows=2", "model.sequence_length=64"]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "MALLOC_ARENA_MAX": "2"}
    answer = subprocess.run(
        [*command, *overrides], cwd=PROJECT, env=environment, preexec_fn=cap, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    (file,) = results.glob("*/*/rtn-*/metrics.json")
    return json.loads(file.read_text())


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory from /proc")
def test_the_memory_does_not_grow_with_the_depth(tmp_path: Path) -> None:
    width = 512
    block = 12 * width**2 * 4
    peaks = []
    for layers in (4, 24):
        folder = opt_folder(tmp_path / f"opt-{layers}", layers, width, 4096, torch.float32)
        metrics = run_capped(folder, tmp_path / f"results-{layers}")
        assert metrics["layers/count"] == 6 * layers
        peaks.append(max(metrics[f"{stage}/peak_memory_gb"] for stage in ("quantize", "evaluate")) * 1e9)
    assert 20 * block > 0.3 * peaks[0]  # held as a whole, the deeper one would stand out
    assert peaks[1] < 1.1 * peaks[0] + block


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_a_model_of_5_gb_goes_through_3_gb(tmp_path: Path) -> None:
    """OPT-2.7b's shape; run with `pytest -m slow tests/models/test_streaming.py` (5.3 GB of disk, some minutes)."""
    folder = opt_folder(tmp_path / "opt-2.7b", 32, 2560, 50_272, torch.float16)
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) > 5.2e9
    metrics = run_capped(
        folder, tmp_path / "results", "model.dtype=bfloat16", limit=3_000_000_000
    )  # no float16 on CPUs
    assert metrics["layers/count"] == 192
    assert metrics["parameters"] > 2.6e9
    assert max(metrics[f"{stage}/peak_memory_gb"] for stage in ("quantize", "evaluate")) < 3
