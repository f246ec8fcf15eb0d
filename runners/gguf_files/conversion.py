"""A GGUF file as a Hugging Face folder in the user's cache: made on first use, checked tensor by tensor, then kept.

The folder holds float32, which every type of GGUF dequantizes to exactly, so that weights are rounded once, when the model
is loaded as its config.json says: float16 for a file of that type, else bfloat16.
"""

import contextlib
import inspect
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging as transformers_logging

from runners.console import console
from runners.errors import InputError
from runners.gguf_files.contents import GgufFile
from runners.gguf_files.kept import NOTE, hold, lock_of, place_of
from runners.gguf_files.tensors import RULES, check_tensors
from runners.gguf_files.tokenizer import load_tokenizer
from runners.storage.files import write
from runners.storage.locks import file_lock

ENDING = ".gguf"
SHARD = "2GB"


def converted(file: Path) -> Path:
    """The folder of a GGUF file, which is made now if there is none yet.

    Raises:
        InputError: the file cannot be used, and why.
    """
    GgufFile(file)  # refuses first what no conversion can help
    folder = place_of(file)
    if not (folder / NOTE).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(lock_of(folder), timeout=-1):
            if not (folder / NOTE).is_file():  # again: another process may have made it while this one waited
                console.print(f"converting {file}, once, into {folder}", highlight=False, soft_wrap=True, markup=False)
                convert(file, folder)
    hold(folder)
    return folder


def converted_before(file: Path) -> Path | None:
    """The folder of a GGUF file, if it has been made."""
    folder = place_of(file) if file.is_file() else None
    return folder if folder is not None and (folder / NOTE).is_file() else None


def convert(file: Path, folder: Path) -> None:
    """Write a GGUF file as a Hugging Face folder, under a temporary name until it is whole.

    Raises:
        InputError: the file cannot be used, and why.
    """
    content = GgufFile(file)
    if content.architecture not in RULES:
        raise InputError(
            f"{file} is of the architecture {content.architecture}, whose tensors cannot be checked here, which is possible "
            f"for {', '.join(RULES)}: take the model's Hugging Face folder"
        )
    tokenizer = load_tokenizer(content)
    model, names = _load(content)
    check_tensors(content, model, names)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        _save(content, model, tokenizer, partial)
        shutil.rmtree(folder, ignore_errors=True)  # of a version that was not whole
        partial.rename(folder)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror or error}): set XDG_CACHE_HOME") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _save(file: GgufFile, model: Any, tokenizer: Any, folder: Path) -> None:
    # What transformers would still take for a quantized model, and what names this machine.
    model.is_quantized, model.hf_quantizer = False, None
    for name in ("quantization_config", "_name_or_path"):
        with contextlib.suppress(AttributeError):
            delattr(model.config, name)
    tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = file.path.stem
    model.save_pretrained(folder, max_shard_size=SHARD)
    tokenizer.save_pretrained(folder)
    # `save_pretrained` writes the dtype of the tensors; what the model is to be loaded as is another.
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = "float16" if file.types.most_common(1)[0][0] == "F16" else "bfloat16"
    write(folder / "config.json", json.dumps(config, indent=2) + "\n")
    write(folder / NOTE, json.dumps({"file": file.path.name, "types": file.types, "note": file.note}) + "\n")


def note_of(folder: Path) -> str | None:
    """What must be said with every number of the model in a folder; None where it was not made of a GGUF file."""
    try:
        return json.loads((folder / NOTE).read_text(encoding="utf-8"))["note"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _load(file: GgufFile) -> tuple[Any, dict[str, str]]:
    """The model in float32, as transformers builds it, and the names of its parameters by those of the file's tensors."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    options: dict[str, Any] = {"gguf_file": file.path.name, "dtype": torch.float32, "local_files_only": True}
    gguf_config = getattr(transformers, "GgufConfig", None)
    if gguf_config is not None and "dequantize" in inspect.signature(gguf_config).parameters:
        options["quantization_config"] = gguf_config(dequantize=True)  # newer versions keep the weights packed
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # its bars
            model: Any = AutoModelForCausalLM.from_pretrained(file.path.parent, trust_remote_code=False, **options)
            processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=model.config.to_dict())
            return model, get_gguf_hf_weights_map(model, processor)
    except Exception as error:  # whatever its classes raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"transformers cannot build the model in {file.path}: {reason}") from error
