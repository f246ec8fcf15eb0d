"""The tokenizer, the token streams, and the sequences of a training step."""

from pathlib import Path

import torch
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from runners.data.stdlib import Kind, Part, documents

END = "</s>"  # separates documents; OPT has the same token for begin, end and padding
KINDS: tuple[Kind, ...] = ("docs", "source")


def prepare(cfg: DictConfig, output: Path) -> tuple[PreTrainedTokenizerFast, dict[str, Tensor]]:
    """The tokenizer and the token streams `<part>/<kind>`; made once, then read from the output folder."""
    tokens = output / "tokens.safetensors"
    if not tokens.exists():
        tokenizer = train_tokenizer(cfg.tokenizer.vocab_size)
        tokenizer.save_pretrained(output / "tokenizer")
        partial = tokens.with_suffix(".partial")  # renamed when complete: its existence says that all of it is there
        save_file(token_streams(tokenizer, "train") | token_streams(tokenizer, "validation"), partial)
        partial.replace(tokens)
    return PreTrainedTokenizerFast.from_pretrained(output / "tokenizer"), load_file(tokens)


def train_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the training documents. Its alphabet has all bytes, so it can encode any text.

    The test suites are left out, because most of their names occur nowhere else.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (d.text for kind in KINDS for d in documents(kind, "train") if "test" not in d.name)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def token_streams(tokenizer: PreTrainedTokenizerFast, part: Part) -> dict[str, Tensor]:
    """For each kind of text, the documents of one part as a single stream of ids, int32 (tokens,)."""
    streams = {}
    for kind in KINDS:
        texts = [document.text + "\n\n" + END for document in documents(kind, part)]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        streams[f"{part}/{kind}"] = torch.tensor([token for document in ids for token in document], dtype=torch.int32)
    return streams


def draw(streams: dict[str, Tensor], cfg: DictConfig, step: int) -> Tensor:
    """The sequences of one step, int64 (batch, context).

    They depend on the seed and the step alone, so a training that continues draws what it would have drawn.
    """
    generator = torch.Generator().manual_seed(step_seed(cfg, step))
    batch, context = cfg.training.batch_size, cfg.model.max_position_embeddings
    from_docs = round(batch * cfg.training.docs_share)
    windows = []
    for kind, count in (("docs", from_docs), ("source", batch - from_docs)):
        stream = streams[f"train/{kind}"]
        starts = torch.randint(len(stream) - context, (count, 1), generator=generator)
        windows.append(stream[(starts + torch.arange(context)).to(stream.device)])
    return torch.cat(windows).long()


def step_seed(cfg: DictConfig, step: int) -> int:
    """The random seed of one step, so that a training that continues gives the same model as one that never stopped."""
    return cfg.seed * 1_000_003 + step  # a prime beyond any number of steps: steps of two seeds never share a seed
