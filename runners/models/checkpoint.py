"""Find a checkpoint, check it before anything is spent on it, and load it: safetensors only, and no code from it."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from runners.errors import InputError
from runners.formats.detect import packed_layers
from runners.formats.scheme import PackedLayer
from runners.gguf_files.conversion import ENDING, converted, converted_before, note_of
from runners.hub import cached_file, download_snapshot, hub_answers
from runners.models.blocks import decoder_blocks
from runners.models.experts import take_apart
from runners.models.quantized_already import CONFIG_KEYS, refuse_quantized
from runners.models.shards import INDEX, WHOLE, Shards, weight_files
from runners.models.verify import MAX_COUNT, check_config, check_tensors, check_tokenizer, refuse_unused, tensor_names
from runners.models.weight_names import match_names

MAX_SEQUENCE_LENGTH = 2048  # tokens: the papers' convention for calibration and perplexity
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Model:
    """One file of `conf/model/`.

    Attributes:
        path: a folder, a GGUF file, or a repository of the model hub.
        revision: branch, tag or commit of the repository; None: its main branch.
        dtype: what the weights are loaded as; None: what the checkpoint holds.
        sequence_length: tokens of a calibration sequence and of an evaluation window; None: the model's, at most 2,048.
    """

    name: str
    path: str
    revision: str | None = None
    dtype: str | None = None
    sequence_length: int | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)} or null, not {self.dtype}")
        if self.sequence_length is not None and self.sequence_length < 2:
            raise ValueError(f"sequence_length must be at least 2, not {self.sequence_length}")

    @property
    def gguf(self) -> Path | None:
        """The GGUF file that `path` names, if it names one."""
        return Path(self.path).expanduser() if self.path.endswith(ENDING) else None

    @property
    def folder(self) -> Path | None:
        """The local folder that `path` names, if it names one; of a GGUF file the folder that it is converted to.

        Raises:
            InputError: `path` names a GGUF file that cannot be used, and why.
        """
        if self.gguf is not None:
            return converted(self.gguf)
        path = Path(self.path).expanduser()
        return path if path.is_dir() or self.path.startswith(("/", "./", "../", "~")) else None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this disk whose files have passed all checks, of an architecture whose decoder blocks are found.

    Attributes:
        skeleton: the model without its weights (on the meta device).
        revision: the hub's commit that the files are of; None for a folder.
        sequence_length: tokens of a calibration sequence and of an evaluation window.
        packed: its quantized layers, by the names of their weights; only of a checkpoint that is measured as it is stored.
    """

    folder: Path
    skeleton: nn.Module
    revision: str | None
    sequence_length: int
    packed: Mapping[str, PackedLayer] = field(default_factory=dict)

    @property
    def shards(self) -> Shards:
        """Its tensors; of quantized layers the weights, which are dequantized as they are read."""
        shards = Shards.of(self.folder)
        return shards.unpacked(self.packed) if self.packed else shards

    @property
    def config(self) -> Any:
        return self.skeleton.config

    @property
    def stored_bits(self) -> int:
        """Bits per weight in the checkpoint."""
        return torch.finfo(self.config.dtype or self.shards.first_dtype()).bits

    @property
    def note(self) -> str | None:
        """What must be said with every number of the model, such as that its full precision is a grid's."""
        return note_of(self.folder)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.skeleton.parameters())


def open_checkpoint(model: Model, *, stored: bool = False) -> Checkpoint:
    """Find and check a checkpoint; downloads it where `model.path` names a repository of the hub.

    Args:
        stored: it was quantized elsewhere, and is to be measured as it is stored.

    Raises:
        InputError: the checkpoint is missing, incomplete, truncated, pickled, or of an architecture that is not supported.
    """
    transformers_logging.set_verbosity_error()
    local = model.folder
    folder, revision = (local, None) if local else download_snapshot(model.path, model.revision)
    # A GGUF file has become a folder of floating-point weights.
    is_packed = stored and model.gguf is None
    check_files(folder, is_packed=is_packed)
    packed = packed_layers(folder, weight_files(folder)) if is_packed else {}
    skeleton = _skeleton(folder)
    _refuse_transposed(folder, skeleton, packed)
    return Checkpoint(folder, skeleton, revision, sequence_length(model, skeleton), packed)


def _refuse_transposed(folder: Path, skeleton: nn.Module, packed: Mapping[str, PackedLayer]) -> None:
    """Refuse quantized layers in a model that keeps its weights as (in, out): whether they are (out, in) is not known."""
    if packed and any(isinstance(module, Conv1D) for module in skeleton.modules()):
        raise InputError(
            f"{folder} is a quantized {type(skeleton).__name__}, which keeps its weights as (in, out): tools differ in how "
            "they store those, so it cannot be read"
        )


def model_skeleton(model: Model, *, stored: bool = False) -> Any:
    """The model without its weights. Of a repository of the hub only `config.json` is downloaded, if the hub answers.

    Args:
        stored: as for `open_checkpoint`.

    Raises:
        InputError: as for `open_checkpoint`; what is wrong with weights that are still on the hub is not found.
    """
    if model.folder is not None or not hub_answers():
        return open_checkpoint(model, stored=stored).skeleton
    transformers_logging.set_verbosity_error()
    folder, _ = download_snapshot(model.path, model.revision, ["config.json"])
    check_config(folder, tensors=MAX_COUNT)
    return _skeleton(folder)


def skeleton_here(model: Model) -> Any | None:
    """The model without its weights, from what is on this disk: nothing is downloaded or converted. None: it is not here.

    Raises:
        InputError: what is here is damaged, or of an architecture that is not supported.
    """
    if model.gguf is not None:
        folder = converted_before(model.gguf)
    elif (folder := model.folder) is None:
        config = cached_file(model.path, model.revision, "config.json")
        folder = None if config is None else config.parent
    if folder is None or not (folder / "config.json").is_file():
        return None
    transformers_logging.set_verbosity_error()
    check_config(folder, tensors=MAX_COUNT)
    return _skeleton(folder)


def _skeleton(folder: Path) -> Any:
    """The model that a checked config.json describes, on the meta device."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        for key in CONFIG_KEYS:  # of a checkpoint that is measured as it is stored: its weights are read as numbers
            config.__dict__.pop(key, None)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # transformers answers a bad config.json with whatever its classes raise
        raise InputError(
            f"transformers cannot build the model that {folder}/config.json describes: {_one_line(error)}"
        ) from error
    if str(config.dtype or torch.float32).removeprefix("torch.") not in DTYPES:
        raise InputError(f"dtype in {folder}/config.json is {config.dtype}, not one of {', '.join(DTYPES)}")
    take_apart(skeleton)
    decoder_blocks(skeleton)
    return skeleton


def load(checkpoint: Checkpoint, model: Model, device: torch.device) -> nn.Module:
    """The model with all its weights on `device`, ready for inference.

    Raises:
        InputError: a weight is missing, has another shape than config.json says, or is not finite.
    """
    # Before the weights are read, and by the same rule as where they are read block by block.
    refuse_unused(checkpoint.folder, match_names(checkpoint.skeleton, checkpoint.shards).unused)
    transformers_logging.disable_progress_bar()
    try:
        packed = checkpoint.packed
        loaded, info = _from_packed(checkpoint, model) if packed else from_files(checkpoint.folder, model.dtype)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"the weights in {checkpoint.folder} do not fit its config.json: {_one_line(error)}"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"{checkpoint.folder} holds no weights for {missing[0]} ({len(missing)} are missing)")
    loaded = loaded.to(device).eval().requires_grad_(False)
    take_apart(loaded)
    for name, parameter in loaded.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InputError(
                f"the weight {name} in {checkpoint.folder} contains NaN or infinity: the checkpoint is damaged"
            )
    return loaded


def from_files(folder: Path, dtype: str | None) -> tuple[Any, dict[str, Any]]:
    """What transformers makes of the files in a folder, and what it says of how it has loaded them.

    It raises whatever its classes raise. None of the folder's code is run.

    Args:
        dtype: of the weights; None: what the checkpoint holds.
    """
    return AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportReturnType]
        folder,
        dtype=getattr(torch, dtype) if dtype else "auto",
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )


def _from_packed(checkpoint: Checkpoint, model: Model) -> Any:
    """The model of a quantized checkpoint, and what transformers says of how it was loaded."""
    shards = checkpoint.shards
    dtype = getattr(torch, model.dtype) if model.dtype else checkpoint.config.dtype or shards.first_dtype()
    dtypes = dict.fromkeys(shards.file_of) | dict.fromkeys(checkpoint.packed, dtype)
    weights = dict(shards.read(dtypes, torch.device("cpu")))
    cls: Any = type(checkpoint.skeleton)
    config = copy.deepcopy(checkpoint.config)
    return cls.from_pretrained(None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True)


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer.

    Raises:
        InputError: there is none, or it does not fit the model's vocabulary.
    """
    check_tokenizer(checkpoint.folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"the tokenizer in {checkpoint.folder} cannot be loaded: {_one_line(error)}") from error
    tokenizer.model_max_length = int(1e30)  # texts are cut into windows here; no warnings about their length
    return tokenizer


def check_files(folder: Path, *, is_packed: bool = False) -> None:
    """Refuse a folder that is not a whole safetensors checkpoint, or whose config.json asks for another one.

    Args:
        is_packed: the weights may be quantized already.

    Raises:
        InputError: saying which file is missing, damaged or does not fit.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}: model.path must name a Hugging Face model folder")
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no config.json, so it is not a Hugging Face model folder")
    files = weight_files(folder)
    if not is_packed:
        refuse_quantized(folder, tensor_names(files))  # first: its codes would be refused, too, but for a lesser reason
    if not files:
        if any(found for pattern in PICKLES for found in folder.glob(pattern)):
            raise InputError(
                f"the weights in {folder} are pickled, and unpickling runs code: convert them to safetensors, for example "
                "by loading them where you trust them and calling save_pretrained"
            )
        raise InputError(f"{folder} holds no weights: there is neither {WHOLE} nor {INDEX}")
    check_config(folder, tensors=check_tensors(files, may_hold_codes=is_packed))


def sequence_length(model: Model, skeleton: Any) -> int:
    """Tokens of a calibration sequence and of an evaluation window.

    Raises:
        InputError: config.json says that the model takes none.
    """
    return model.sequence_length or _sequence_length(skeleton.config)


def _sequence_length(config: Any) -> int:
    """The longest sequence the model was made for, at most 2,048. BLOOM (alibi) calls it seq_length, or nothing."""
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or getattr(text, "seq_length", None) or MAX_SEQUENCE_LENGTH
    if longest == -1 and "max_position_embeddings" not in text.to_dict():
        longest = (
            MAX_SEQUENCE_LENGTH  # XLNet's class says that its relative positions have no end; no entry of the file does
        )
    if type(longest) is not int or longest < 2:
        raise InputError(f"config.json says that the model takes {longest!r} tokens: it must be a number of at least 2")
    return min(longest, MAX_SEQUENCE_LENGTH)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
