"""A small random model of every causal LM that the installed transformers knows, from its own default configuration.

Sizes are made small by the names that configurations use for them; `SPECIAL` holds what a family needs besides, and
`NOT_BUILT` the reason why one is left out.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ALL_FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 4099  # the bundled tokenizer's 4,096, and a few rows that no text reaches
LARGEST = 3_000_000  # parameters; a family that cannot be made smaller has a size that its configuration does not name
BLOCKS = 3
SHARPER = 4.0  # times the matrices of transformers' initialization, whose predictions are nearly even
DTYPES = {"bfloat16": torch.bfloat16}
VARIANTS = ("untied", "tied", "bfloat16", "encoder")  # `encoder`: a causal LM by name, whose attention also looks ahead


class NotBuilt(Exception):
    """The family has no such variant, or its configuration cannot be made small."""


def _sizes(hidden: int, inner: int, heads: int, head: int, experts: int) -> dict[str, Any]:
    """What the entries of a configuration are set to, for all names that families have for them."""
    names: list[tuple[float, str]] = [
        (VOCABULARY, "vocab_size unpadded_vocab_size vocab_size_per_layer_input"),
        (BLOCKS, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers"),
        (BLOCKS, "num_encoder_layers"),
        (hidden, "hidden_size d_model n_embd embed_dim emb_dim embedding_size model_dim dim dim_model lru_width"),
        (hidden, "word_embed_proj_dim decoder_hidden_size hidden_size_global input_embedding_size attn_hidden_size"),
        (hidden, "output_embedding_size pronunciation_embed_dim shape_embed_dim kv_n_embd"),
        (inner, "intermediate_size ffn_dim n_inner d_ff dim_ff decoder_ffn_dim encoder_ffn_dim ffn_hidden_size"),
        (inner, "mlp_dim mlp_hidden_size intermediate_size_mlp"),
        (heads, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"),
        (heads, "num_encoder_attention_heads num_decoder_attention_heads linear_num_key_heads linear_num_heads"),
        (heads, "linear_num_value_heads mamba_num_heads mamba_n_heads swa_num_attention_heads"),
        (head, "head_dim d_kv qk_nope_head_dim qk_rope_head_dim v_head_dim dim_head rotary_dim global_head_dim"),
        (head, "linear_head_dim linear_key_head_dim linear_value_head_dim mamba_head_dim swa_head_dim index_head_dim"),
        (2 * head, "qk_head_dim"),
        (2 * hidden, "mamba_d_ssm"),
        (2 * hidden // heads, "mamba_d_head attention_head_dim"),
        (experts, "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size q_lora_rank"),
        (experts, "kv_lora_rank expert_ffn_hidden_size shared_experts_intermediate_size nemo_hidden_size"),
        (64, "max_position_embeddings n_positions n_ctx max_seq_len seq_length max_sequence_length model_max_length"),
        (8, "sliding_window sliding_window_size window_size attention_window_size state_size mamba_d_state"),
        (8, "ssm_state_size d_rel rel_extent hidden_size_per_layer_input"),
        (4, "n_routed_experts num_local_experts num_experts index_n_heads index_topk time_step_rank"),
        (4, "mamba_dt_rank patch_size"),
        (2, "num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok num_experts_per_token"),
        (2, "top_k moe_topk type_vocab_size moe_top_k"),
        (1, "n_group num_expert_group topk_group n_shared_experts num_shared_experts first_k_dense_replace n_groups"),
        (1, "mamba_n_groups"),
        (16, "image_size"),
        (0, "bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id pad_index bos_index eos_index"),
        (0.0, "layerdrop dropout attention_dropout hidden_dropout resid_pdrop hidden_dropout_prob"),
        (0.0, "attention_probs_dropout_prob"),
    ]
    sizes: dict[str, Any] = {name: size for size, text in names for name in text.split()}
    return sizes | {"per_layer_config": {}}


WIDTHS = {  # tried in this order: odd widths show what only holds for multiples of 8
    "odd": _sizes(hidden=36, inner=44, heads=6, head=6, experts=20),
    "even": _sizes(hidden=32, inner=48, heads=4, head=8, experts=24),
}
WITHOUT = ((), ("head_dim",), ("num_key_value_heads",), ("head_dim", "num_key_value_heads"))  # left at their defaults

_SHARED_KEYS = {  # two blocks that share keys and values with earlier ones of their kind
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8}
_QWEN4 = _INDEXER | {"indexer_compress_ratio": 2, "hc_lowrank": 8, "output_gate_type": "silu"}
SPECIAL: dict[str, dict[str, Any]] = {  # what a family needs besides; entries of nested configurations are dictionaries
    "blt": {"encoder_hash_byte_group_vocab": 50, "hidden_size": 36},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {kind: _ROPE for kind in ("full_attention", "sliding_attention")},
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "num_key_value_heads": 6},
    "dory": {
        "num_hidden_layers": 6, "n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2,
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "full_attention", "mlp"],
    },
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots3_note": {
        "text_config": {"num_key_value_heads": 6, "head_dim": 12},
        "vision_config": {"adapter_in_dim": 36, "adapter_out_dim": 36},
        "audio_config": {"num_key_value_heads": 6, "downsample_hidden_size": 8, "adapter_out_dim": 36}
        | {"adapter_input_size": 36},
    },
    "dots3_note_text": {"num_key_value_heads": 6, "head_dim": 12},
    "gemma3n_text": _SHARED_KEYS | {
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0], "intermediate_size": [44] * 4, "laurel_rank": 6,
    },
    "gemma4": {"text_config": _SHARED_KEYS},
    "gemma4_text": _SHARED_KEYS,
    "gemma4_unified": {"text_config": _SHARED_KEYS},
    "gemma4_unified_text": _SHARED_KEYS,
    "git": {"vision_config": {"num_hidden_layers": 2}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "gptj": {"rotary_dim": 4},
    "hunyuan_v1_dense": {"head_dim": 6},
    "hunyuan_v1_moe": {"head_dim": 6, "num_experts": 4, "moe_topk": 2},
    "inkling2_loop_text": {
        "loop_layer_index_start": 1, "loop_layer_index_end": 2, "loop_gate_rank": 4, "n_layers_per_attn_res_block": 1,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "mamba2": {"head_dim": 12, "num_heads": 6, "expand": 2},
    "ministral": {"head_dim": 6},
    "nemotron": {"num_key_value_heads": 2},
    "phi4_multimodal": {
        "audio_config": {"nemo_conv_channels": 16, "ext_pw_out_channel": 36, "num_blocks": 2},
        "vision_config": {"num_hidden_layers": 2},
    },
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {"axial_pos_embds_dim": [16, 20], "axial_pos_shape": [8, 8]},
    "roc_bert": {"shape_vocab_size": 50, "pronunciation_vocab_size": 50},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
_DRAFTS = "drafts tokens for another model, and takes that model's hidden states instead of a text"
_AUDIO = "generates audio: several codebooks at a time, no text"
NOT_BUILT: dict[str, str] = {
    "gemma3n": "its vision tower needs the package timm",
    "gemma4_assistant": _DRAFTS,
    "gemma4_unified_assistant": _DRAFTS,
    "musicgen": _AUDIO,
    "musicgen_melody": _AUDIO,
}


def small_model(family: str, variant: str = "untied", seed: int = 0) -> Any:
    """A randomly initialized model in evaluation mode, float32, sharpened so that its predictions are not even.

    Raises:
        NotBuilt: saying why.
    """
    if family in NOT_BUILT:
        raise NotBuilt(NOT_BUILT[family])
    failures: list[Exception] = []
    for entries in _small_entries(family, variant):
        try:
            model = _build(CONFIG_MAPPING[family], entries, DTYPES.get(variant, torch.float32), seed)
        except NotBuilt as failure:
            failures.append(failure)
            continue
        if not _is_of(model, variant):
            raise NotBuilt(f"there is no such variant: {variant}")
        return model
    raise NotBuilt("; ".join(dict.fromkeys(str(failure) for failure in failures)))


def token_ids(count: int, length: int, seed: int = 1) -> Tensor:
    """Random token ids (count, length) of the bundled tokenizer."""
    return torch.randint(4096, (count, length), generator=torch.Generator().manual_seed(seed))


def _small_entries(family: str, variant: str) -> Iterator[dict[str, Any]]:
    """The entries of small configurations, from the most wanted one."""
    default = CONFIG_MAPPING[family]().to_dict()
    chosen = {"tie_word_embeddings": variant == "tied", "is_decoder": variant != "encoder"}
    for sizes in WIDTHS.values():
        small = _merged(_shrunk(default, sizes | chosen), SPECIAL.get(family, {}))
        for names in WITHOUT:
            if all(name in small for name in names):
                yield {name: value for name, value in small.items() if name not in names}


def _merged(entries: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = entries | changes
    for name, value in changes.items():
        if isinstance(value, dict) and name in entries:
            merged[name] = _merged(entries[name], value)
    return merged


def _shrunk(entries: dict[str, Any], sizes: dict[str, Any]) -> dict[str, Any]:
    """The entries that are to be changed, with those of the configurations in them."""
    small: dict[str, Any] = {}
    for name, value in entries.items():
        if isinstance(value, dict) and name.endswith("config") and name not in sizes:
            small[name] = value | _shrunk(value, sizes)
        elif name in sizes and (value is not None or name.endswith("token_id")):
            small[name] = sizes[name]
        elif isinstance(value, list) and name in ("layer_types", "mlp_layer_types", "layers_block_type"):
            kinds = list(dict.fromkeys(value))
            small[name] = (kinds * BLOCKS)[:BLOCKS]
    return small


def _build(make: type[PretrainedConfig], entries: dict[str, Any], dtype: torch.dtype, seed: int) -> Any:
    try:
        config = make(**entries)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        count = sum(parameter.numel() for parameter in skeleton.parameters())
        if count > LARGEST:
            raise NotBuilt(f"{count:,} parameters, however small its sizes")
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        model = _sharpen(model, seed).to(dtype)
        model(token_ids(2, 12), use_cache=False)
        return model
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


def _is_of(model: Any, variant: str) -> bool:
    """Whether the configuration did what the variant asks for."""
    if variant == "encoder":
        return not getattr(model.config, "is_decoder", True)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = head is not None and head.weight is embedding.weight
    return variant == "bfloat16" or is_tied == (variant == "tied")


def _sharpen(model: Any, seed: int) -> Any:
    """Larger matrices, so that what is left out shows; and no vector or buffer that is stored keeps its initial value."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in {id(tensor): tensor for tensor in model.state_dict().values()}.values():
        if tensor.is_floating_point() and tensor.ndim >= 2:
            tensor.mul_(SHARPER)
        elif tensor.is_floating_point():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model
