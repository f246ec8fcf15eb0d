"""The tokenizer of a GGUF file, made to split text as the original does.

A GGUF file holds the vocabulary and the merges of a byte-level BPE, and of the splitting before it only a name,
`tokenizer.ggml.pre`. transformers splits as GPT-2 whatever the name. The rules of the names below are those of the
originals' tokenizer.json, which llama.cpp repeats in `llama-vocab.cpp`; any other name is refused, because a text that is
split in another way has other tokens and another perplexity.
"""

from typing import Any

from tokenizers import Regex, pre_tokenizers
from tokenizers.pre_tokenizers import PreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from runners.errors import InputError
from runners.gguf_files.contents import GgufFile

PROBE = "It's 3 o'clock, isn't it?  In 2024: 1,234.5 m²\n\n\tdef f(x):\n    return x  12 — 日本語 naïve 😀👍🏽 end "
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _gpt2() -> PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits() -> PreTokenizer:
    """As GPT-2, and every digit alone."""
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _regex(pattern: str) -> PreTokenizer:
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_alone])


SPLITTING = {
    **dict.fromkeys(("gpt-2", "gpt2", "olmo", "jais", "phi-2"), _gpt2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "command-r"), _digits),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), lambda: _regex(LLAMA3)),
    "qwen2": lambda: _regex(QWEN2),
}


def load_tokenizer(file: GgufFile) -> PreTrainedTokenizerBase:
    """The file's tokenizer.

    Raises:
        InputError: transformers cannot build it, its way of splitting is not known here, or it does not give a text back.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            file.path.parent, gguf_file=file.path.name, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise InputError(f"transformers cannot build the tokenizer in {file.path}: {error}") from error
    if file.get("tokenizer.ggml.model") == "gpt2":
        name = str(file.get("tokenizer.ggml.pre"))
        if name not in SPLITTING:
            raise InputError(
                f"the tokenizer in {file.path} splits text by rules of the name {name}, not one of {', '.join(SPLITTING)}: "
                "take the model's Hugging Face folder"
            )
        tokenizer.backend_tokenizer.pre_tokenizer = SPLITTING[name]()
    _set_bos(tokenizer, file)
    ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if back.strip() != PROBE.strip():
        raise InputError(
            f"the tokenizer in {file.path}, as transformers builds it, does not give a text back: {back!r}"
        )
    return tokenizer


def _set_bos(tokenizer: Any, file: GgufFile) -> None:
    """Let the tokenizer add a token before a text if and only if the file says so."""
    wanted = file.get("tokenizer.ggml.add_bos_token")
    added, plain = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    if wanted is None or bool(wanted) == (added != plain):
        return
    bos = tokenizer.bos_token
    if wanted and bos is None:
        raise InputError(f"the tokenizer in {file.path} is to add a BOS token, and has none")
    single = f"{bos}:0 $A:0" if wanted else "$A:0"
    special = [(bos, tokenizer.bos_token_id)] if wanted else []
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
