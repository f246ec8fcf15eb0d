"""The keys of cached activations, cached statistics and finished blocks: everything that their values depend on."""

import platform
from typing import Any

from runners.config.settings import Settings
from runners.data.token_ids import ids_hash
from runners.run.environment import device_name, versions
from runners.run.preflight import RunInputs
from runners.storage.fingerprint import checkpoint_fingerprint, code_fingerprint

OF_ACTIVATIONS = (  # the modules that compute activations and Hessians; a change in one of them makes the cache stale
    "runners/models/blocks.py",
    "runners/models/experts.py",
    "runners/models/bypass.py",
    "runners/models/containers.py",
    "runners/models/activations.py",
    "runners/quantization/input_statistics.py",
    "runners/quantization/measuring.py",
    "runners/quantization/token_energy.py",
    "runners/quantization/calibration_activations.py",
    "runners/quantization/calibration_modes.py",
    "runners/models/streaming.py",
    "runners/models/shards.py",
    "runners/models/weight_names.py",
    "runners/formats/*.py",
    "quantease/matmul.py",
)

OF_CODES = (  # all that can change a code, a scale or the record of a layer: finished blocks of another version are refused
    "quantease/**/*.py",
    "baselines/**/*.py",
    "runners/data/*.py",
    "runners/gguf_files/*.py",
    "runners/models/*.py",
    "runners/quantization/*.py",
    "runners/results/layers.py",
    "runners/config/run.py",
    "runners/run/keys.py",
    "runners/run/preflight.py",
    "runners/run/stages.py",
)


def model_key(settings: Settings, inputs: RunInputs) -> dict[str, Any]:
    """What the activations of the unquantized model depend on, except the tokens.

    `batch_size` and the device are part of it because they change the order of floating-point sums, and so the last digits.
    """
    return {
        "model": checkpoint_fingerprint(inputs.checkpoint.folder),
        "dtype": settings.run.model.dtype,
        "batch_size": inputs.batch_size,
        "code": code_fingerprint(*OF_ACTIVATIONS),
        "versions": versions(),
        "device": device_name(inputs.device),
    }


def statistics_key(settings: Settings, inputs: RunInputs) -> dict[str, Any]:
    """What calibration on the unquantized model depends on."""
    sequences, calibration = inputs.sequences, settings.run.calibration
    held_out = None if sequences is None or sequences.held_out is None else ids_hash(sequences.held_out)
    return model_key(settings, inputs) | {
        "ids": None if sequences is None else sequences.sha256,
        "held_out": held_out,
        "token_weights": None if calibration is None else calibration.token_weights,
    }


def resume_identity(settings: Settings, inputs: RunInputs) -> dict[str, Any]:
    """What must be the same for finished blocks to be used again. The error that refuses them names the key that differs.

    It is stricter than the cache: solvers, data and harness count, because a run must not mix blocks of two versions. What
    is measured on the codes does not: another evaluation may use them.
    """
    key = statistics_key(settings, inputs)
    return {
        "configuration": settings.quantization_identity(),
        "code version": code_fingerprint(*OF_CODES),
        "library version": key["versions"] | {"python": platform.python_version()},
        "model": key["model"],
        "set of calibration sequences": [key["ids"], key["held_out"]],
        "device": key["device"],
        "batch_size": key["batch_size"],
    }
