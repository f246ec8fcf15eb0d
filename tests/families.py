"""Random two-block models of every supported family: the real architectures, a thousandth of the size."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig

LENGTH = 24  # longer than the sliding windows below
VOCABULARY = 128

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_OPT: dict[str, Any] = _SIZES | {"ffn_dim": 64, "dropout": 0.0}
_GATED: dict[str, Any] = _SIZES | {"intermediate_size": 64, "num_key_value_heads": 2}
_GEMMA: dict[str, Any] = _GATED | {
    "head_dim": 8,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
_GEMMA4: dict[str, Any] = _GATED | {  # the last two blocks share keys and values; each has an embedding of the tokens
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "sliding_window": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "pad_token_id": 0,
}
_FALCON: dict[str, Any] = _SIZES | {"bias": False, "alibi": False}

FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "opt": lambda: transformers.OPTConfig(**_OPT, word_embed_proj_dim=32),
    "opt-350m": lambda: transformers.OPTConfig(**_OPT, word_embed_proj_dim=16, do_layer_norm_before=False),
    "bloom": lambda: transformers.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    ),
    "falcon-7b": lambda: transformers.FalconConfig(**_FALCON, multi_query=True, parallel_attn=True),
    "falcon-40b": lambda: transformers.FalconConfig(**_FALCON, num_kv_heads=2, new_decoder_architecture=True),
    "llama": lambda: transformers.LlamaConfig(**_GATED),
    "mistral": lambda: transformers.MistralConfig(**_GATED, sliding_window=8),
    "qwen3": lambda: transformers.Qwen3Config(**_GATED, head_dim=8),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**_SIZES, intermediate_size=64),
    "gemma2": lambda: transformers.Gemma2Config(**_GEMMA),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_GEMMA),
    "gemma4": lambda: transformers.Gemma4TextConfig(**_GEMMA4),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    ),
}


def random_model(family: str, seed: int = 0) -> Any:
    """A randomly initialized model in evaluation mode, float32."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(FAMILIES[family]()).eval().requires_grad_(False)


def random_ids(count: int, length: int = LENGTH, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))
