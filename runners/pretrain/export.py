"""Export a trained model in the format of the hub, with a model card: training, texts, held-out perplexity."""

import csv
import io
import platform
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from runners.data.datasets import StandardLibrary
from runners.data.windows import Text, cut_windows
from runners.evaluation.likelihood import perplexity, window_losses
from runners.storage.files import write

CARD = """# The bundled model

{parameters:.1f} M parameters of OPT's architecture: {layers} decoder blocks of width {width}, {heads} heads, context
{context}, a byte-level BPE of {vocabulary:,} entries of its own, stored in bfloat16. It exists so that quantization methods
can be compared on a trained model without a model hub; it has no other use.

**Training.** `python -m runners.pretrain` with the settings of `conf/pretrain.yaml`: {steps:,} steps of {batch} sequences,
{tokens:.0f} M tokens, in {seconds:,} seconds on {device}. `training.csv` holds loss and validation perplexity along the way.

**Text.** What Python {python} carries: the language reference (`pydoc_data.topics`), and the docstrings and the source of
the standard library, under the PSF's license. A hash of each document's name puts it into one of four parts: 80 % to
train on (with the test suites), 2 % to watch the training with, 8 % to calibrate on and 10 % to evaluate on
(`runners/data/stdlib.py`).

**Held-out perplexity** of the exported weights, on all windows of {context} tokens of the evaluation part:

| text | windows | perplexity |
|---|---|---|
{rows}
"""


def export(model: Any, tokenizer: PreTrainedTokenizerBase, history: list[dict[str, Any]], folder: Path) -> None:
    """Write bfloat16 safetensors, the configuration, the tokenizer, and the history of the training as `training.csv`."""
    model.to(torch.bfloat16).cpu().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write(folder / "training.csv", text.getvalue())


def write_card(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    cfg: DictConfig,
    folder: Path,
    device: str,
    history: list[dict[str, Any]],
) -> None:
    """Measure the exported model on the evaluation texts and write its card."""
    rows = []
    model = model.float().eval()  # the stored bfloat16 values, but float32 arithmetic, as in every run of model=tiny
    for kind in ("docs", "source"):
        text = Text("gptq", StandardLibrary("evaluation", kind))
        windows = cut_windows(kind, text, tokenizer, cfg.model.max_position_embeddings, data_root=None)
        value = perplexity(torch.cat(list(window_losses(model, windows.ids, batch_size=4))))
        rows.append(f"| stdlib_{kind} | {len(windows.ids)} | {value:.2f} |")
    card = CARD.format(
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        layers=cfg.model.num_hidden_layers,
        width=cfg.model.hidden_size,
        heads=cfg.model.num_attention_heads,
        context=cfg.model.max_position_embeddings,
        vocabulary=len(tokenizer),
        steps=history[-1]["step"],
        batch=cfg.training.batch_size,
        tokens=history[-1]["tokens"] / 1e6,
        seconds=history[-1]["seconds"],
        device=device,
        python=platform.python_version(),
        rows="\n".join(rows),
    )
    write(folder / "README.md", card)
