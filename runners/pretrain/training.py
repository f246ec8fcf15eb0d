"""The training loop: a plain next-token training of a small OPT."""

import logging
import time
from contextlib import AbstractContextManager, nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from runners.console import progress
from runners.pretrain.checkpoint import Checkpoints
from runners.pretrain.data import KINDS, draw, prepare, step_seed

log = logging.getLogger(__name__)


def train(cfg: DictConfig, output: Path) -> tuple[Any, PreTrainedTokenizerFast, list[dict[str, Any]]]:
    """Train to the last step, from the newest checkpoint in `output`; returns model, tokenizer and history."""
    device = torch.device(cfg.training.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer, streams = prepare(cfg, output)
    checkpoints = Checkpoints(output, _identity(cfg, streams))
    streams = {name: stream.to(device) for name, stream in streams.items()}
    model: Any = build(cfg, tokenizer)
    model.to(device).train()
    optimizer = make_optimizer(model, cfg)
    history = checkpoints.load(model, optimizer)
    cast = reduced_precision(cfg, device)
    forward = torch.compile(model) if cfg.training.compile else model
    first = history[-1]["step"] if history else 0
    start = time.perf_counter() - (history[-1]["seconds"] if history else 0)
    with progress("training", cfg.training.steps - first) as advance:
        for step in range(first, cfg.training.steps):
            loss = take_step(forward, optimizer, draw(streams, cfg, step), cfg, step, cast)
            advance(f"step {step + 1}")
            if (step + 1) % cfg.training.save_every == 0 or step + 1 == cfg.training.steps:
                held_out = validate(model, streams, cfg.model.max_position_embeddings, cast)
                history.append(_entry(cfg, step + 1, loss.item(), held_out, time.perf_counter() - start))
                checkpoints.save(model, optimizer, history)
    return model, tokenizer, history


def build(cfg: DictConfig, tokenizer: PreTrainedTokenizerFast) -> OPTForCausalLM:
    """An OPT of the configured size with random weights."""
    torch.manual_seed(cfg.seed)
    end: Any = tokenizer.eos_token_id
    sizes: Any = OmegaConf.to_container(cfg.model)
    config = OPTConfig(
        vocab_size=len(tokenizer),
        word_embed_proj_dim=cfg.model.hidden_size,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        **sizes,
    )
    return OPTForCausalLM(config)


def make_optimizer(model: nn.Module, cfg: DictConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: biases and norms have few parameters and no reason to be small."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": cfg.training.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.training.learning_rate, betas=(0.9, 0.95), fused=True)  # GPT-3's betas


def learning_rate(cfg: DictConfig, step: int) -> float:
    """Linear warm-up, then linear decay to zero at the last step."""
    warmup = min(1.0, (step + 1) / cfg.training.warmup_steps)
    return cfg.training.learning_rate * warmup * (1 - step / cfg.training.steps)


def take_step(
    forward: Any,
    optimizer: torch.optim.Optimizer,
    batch: Tensor,
    cfg: DictConfig,
    step: int,
    cast: AbstractContextManager,
) -> Tensor:
    """One step of training; returns the loss (nats per token)."""
    torch.manual_seed(step_seed(cfg, step))  # of dropout, whether or not the steps before ran in this process
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(cfg, step)
    with cast:
        loss = forward(input_ids=batch, labels=batch).loss
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


@torch.no_grad()
def validate(model: Any, streams: dict[str, Tensor], context: int, cast: AbstractContextManager) -> dict[str, float]:
    """Perplexity of the validation documents of each kind, over windows that do not overlap."""
    model.eval()
    answer = {}
    for kind in KINDS:
        stream = streams[f"validation/{kind}"]
        windows = stream[: len(stream) // context * context].reshape(-1, context).long()
        with cast:
            losses = [model(input_ids=batch, labels=batch).loss * len(batch) for batch in windows.split(64)]
        answer[kind] = (torch.stack(losses).sum() / len(windows)).exp().item()
    model.train()
    return answer


def reduced_precision(cfg: DictConfig, device: torch.device) -> AbstractContextManager:
    """Autocast to bfloat16 if the settings ask for it; where they are null, if the hardware is fast at it."""
    wanted = cfg.training.bfloat16
    if wanted is None:
        wanted = device.type == "cuda" or torch.cpu._is_amx_tile_supported()
    return torch.autocast(device.type, torch.bfloat16) if wanted else nullcontext()


def _identity(cfg: DictConfig, streams: dict[str, Tensor]) -> str:
    """Hash of everything that a checkpoint depends on: the settings of the training, and the tokens."""
    digest = sha256(OmegaConf.to_yaml(OmegaConf.masked_copy(cfg, ["seed", "tokenizer", "model", "training"])).encode())
    for name in sorted(streams):
        digest.update(streams[name].numpy().tobytes())
    return digest.hexdigest()


def _entry(cfg: DictConfig, step: int, loss: float, held_out: dict[str, float], seconds: float) -> dict[str, Any]:
    tokens = step * cfg.training.batch_size * cfg.model.max_position_embeddings
    log.info(
        "step %d, %.1f M tokens: training loss %.3f; validation perplexity docs %.2f, source %.2f",
        *(step, tokens / 1e6, loss, held_out["docs"], held_out["source"]),
    )
    figures = {"loss": round(loss, 3), "docs": round(held_out["docs"], 2), "source": round(held_out["source"], 2)}
    return {"step": step, "tokens": tokens, "seconds": round(seconds)} | figures
