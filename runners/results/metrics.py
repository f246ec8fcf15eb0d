"""The schema of `metrics.json`: its keys, the values each may take, and the words for them.

The one place that knows how a result is written: whatever makes, shows or analyzes results takes its keys and words from
here. "Metrics" is the word for the content of one run's `metrics.json`, in memory as on disk. This module imports neither
torch nor pandas, because `analysis` must start without torch.
"""

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from enum import StrEnum
from hashlib import sha256 as sha256_of
from pathlib import Path
from typing import Any, NoReturn

METRICS = "metrics.json"  # in a run's folder
SEAL = "seal"  # what the files of the run were when it ended (`runners.results.seal`); absent from older results
SEALED_FILES, CHECKSUM, BYTES, ROWS = "files", "sha256", "bytes", "rows"  # keys within it
REFERENCE = "fp16"  # the method that leaves the weights as they are, whatever their dtype
STORED = "stored"  # the method that measures a checkpoint as another tool has quantized it


class Status(StrEnum):
    """How far a cell has come. Only the first three, `ENDED`, occur in `metrics.json`; the run's folder shows the others."""

    DONE = "done"
    FAILED = "failed"
    UNSUPPORTED = "unsupported"  # the method cannot do what the grid asks
    RUNNING = "running"
    UNFINISHED = "unfinished"  # some of its finished blocks are on disk
    INTERRUPTED = "interrupted"
    MISSING = "missing"


ENDED = (Status.DONE, Status.FAILED, Status.UNSUPPORTED)
OPEN = (Status.UNFINISHED, Status.INTERRUPTED, Status.MISSING)  # the same command, given again, continues these
_BEST_FIRST = (Status.DONE, Status.UNSUPPORTED, Status.RUNNING, *OPEN[:2], Status.FAILED, Status.MISSING)


class Reason(StrEnum):
    """Why a run failed: its key `reason`."""

    EXCEPTION = "exception"
    KILLED = "killed"
    TIMEOUT = "timeout"
    INTERRUPTED = "interrupted"
    DAMAGED = "damaged"  # its metrics.json cannot be read


# Keys that stand alone.
BITS_PER_WEIGHT = "bits_per_weight"
BITS_PER_PARAMETER = "bits_per_parameter"
OUTLIER_RATIO = "outlier_ratio"
RELATIVE_ERROR = "layers/mean_relative_error"
HELD_OUT_ERROR = "layers/mean_held_out_error"
TOKEN_ERROR = "layers/mean_token_error"
LAYER_COUNT = "layers/count"
QUANTIZE_SECONDS = "quantize/seconds"
QUANTIZE_MEMORY = "quantize/peak_memory_gb"
EVALUATE_SECONDS = "evaluate/seconds"
EVALUATE_MEMORY = "evaluate/peak_memory_gb"
ZERO_SHOT_SECONDS = "zero_shot/seconds"
RUN_SECONDS = "run/seconds"  # of the process that ended the run, from its beginning; absent from older results
ZERO_SHOT_MEMORY = "zero_shot/peak_memory_gb"  # absent from older results
ZERO_SHOT_BATCH_SIZE = (
    "zero_shot/batch_size"  # sequences of full length at once: it decides the order of sums, so near ties
)
CALIBRATION_SHA256 = "calibration/sha256"
CALIBRATION_BOS = "calibration/bos"  # as `bos` of a text
CALIBRATION_TOKENS = "calibration/tokens"
CALIBRATION_DISTINCT = "calibration/distinct_tokens"  # at different places of the calibration text
CALIBRATION_DOCUMENTS = "calibration/documents"  # that the sequences are from; absent where all are joined
CALIBRATION_HELD_OUT = "calibration/held_out_sequences"
CALIBRATION_NOTES = "calibration/notes"  # what the text was too small for
PPL_WITH_BOS = "evaluate/ppl_with_bos"  # of the unquantized model on one window that begins with BOS,
PPL_WITHOUT_BOS = "evaluate/ppl_without_bos"  # and without
CHECKPOINT_SHA256 = "checkpoint/sha256"
CHECKPOINT_FROM = "checkpoint/from"  # the run that the codes were taken over from; absent where this run has made them
QUANTIZATION = "quantization"  # the digest of what determines the codes; absent from older results
CALIBRATION = "calibration"  # its name
CALIBRATION_INPUTS = "calibration_inputs"  # absent where there was no calibration, as token weights are
TOKEN_WEIGHTS = "token_weights"  # absent from results older than the setting: uniform
FALLBACK = "fallback"  # what layers get that calibration has reached too little; absent where there was no calibration,
# and from results older than the setting: FALLBACK_KEEP
FALLBACK_RTN, FALLBACK_KEEP, FALLBACK_ERROR = FALLBACKS = ("rtn", "keep", "error")
CACHE_HITS = "cache/hits"
CACHE_MISSES = "cache/misses"
MEMORY_STEPS = "memory/steps"
MODEL_NOTE = "model_note"  # what must be said with every number of the model; absent where there is nothing
CALIBRATION_NOTE = "calibration_note"  # what must be said of texts that were calibrated on; absent where there are none
MODEL_DTYPE = "model_dtype"  # of the weights before quantization, as torch names it; absent from older results
MODEL_PATH = "model_path"  # the fingerprint of the model's files, or its name on the hub
# Of a checkpoint that was quantized elsewhere, from its own config:
STORED_METHOD = "stored_method"  # the method, as far as the config names it, else the format
STORED_LAYOUT = "stored_layout"  # the format, with its version
INT = "int"  # the name of the uniform grid
STORED_GRID = "stored_grid"  # `int`, `nf4`, or the types of a GGUF file


# Of a zero-shot task, beside its metrics: questions, version of its definition, hash of its prompts, and prompts whose
# beginning was cut because the model takes fewer tokens (there only if some were).
MEASURED_HOW = ("samples", "version", "sha256", "truncated")


# Keys of a family: the part before the first slash names the family, the rest what was measured.
def ppl(text: str) -> str:
    """Perplexity on a text."""
    return f"ppl/{text}"


def protocol(text: str) -> str:
    """The name of the protocol that the perplexity on a text was measured under."""
    return f"protocol/{text}"


def windows(text: str) -> str:
    """How many windows of a text were measured."""
    return f"windows/{text}"


def bos(text: str) -> str:
    """Where a text has the token that begins texts: `text` (in its first window only), `window` (in every) or `none`."""
    return f"bos/{text}"


def sha256(text: str) -> str:
    """The hash of the token ids of a text's windows."""
    return f"sha256/{text}"


def agreement(text: str, measure: str) -> str:
    """How well next-token distributions agree with the unquantized model's.

    `measure` is `kl` (mean, nats per token) or `top1`; a name of KL_QUANTILES; `confidence_kl` or `confidence_share` of a
    bucket; or, of the unquantized model alone, KL_FLOOR or TOP1_FLOOR.
    """
    return f"agreement/{text}/{measure}"


KL_QUANTILES = {"kl_median": 0.5, "kl_p90": 0.9, "kl_p95": 0.95, "kl_p99": 0.99}  # over the tokens of a text
CONFIDENCE_EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # of the unquantized model's largest probability, in five buckets
KL_FLOOR, TOP1_FLOOR = (
    "kl_floor",
    "top1_floor",
)  # the unquantized model against itself, rounded once more in every block


KL_RESOLUTION = 1e-7  # nats: of sums of float32 log-probabilities, each of which is known to about 1e-7 of itself


def floor_words(floor: float) -> str:
    """A noise floor of the KL divergence, which is never negative: what is measured below the resolution is rounding."""
    if abs(floor) < KL_RESOLUTION:
        return f"below {KL_RESOLUTION:.0e}, all that float32 resolves"
    return f"{floor:.1e}"


def confidence_kl(bucket: int) -> str:
    """The measure: mean KL of the tokens in a bucket of confidence, `kl_confidence_20_40`."""
    return f"kl_confidence_{_edges(bucket)}"


def confidence_share(bucket: int) -> str:
    """The measure: which share of the tokens is in a bucket of confidence, `share_confidence_20_40`."""
    return f"share_confidence_{_edges(bucket)}"


def _edges(bucket: int) -> str:
    return "_".join(f"{100 * edge:.0f}" for edge in CONFIDENCE_EDGES[bucket : bucket + 2])


def zero_shot(task: str, metric: str) -> str:
    """A metric of a zero-shot task, or one of the facts of MEASURED_HOW about it."""
    return f"zero_shot/{task}/{metric}"


def skipped(name: str) -> str:
    """Why a text or task was not measured."""
    return f"skipped/{name}"


# Why a zero-shot task was not measured, where another try may well go better; other reasons stay what they are.
OUT_OF_MEMORY = "lm-eval needs the whole model in memory, which ran out: take a larger machine, or batch_size=1"


def tasks_without_memory(metrics: Mapping[str, Any]) -> list[str]:
    """The zero-shot tasks of a run that were skipped because memory ran out."""
    return [name for name in names(metrics, "skipped") if metrics[skipped(name)] == OUT_OF_MEMORY]


# Beside metrics in the row of a cell, never in `metrics.json`:
TASKS_LEFT = "tasks_left"  # which zero-shot tasks of a run that is done the same command tries again, in words
COMMAND = "command"  # that asked for the cell last: the words after `python run.py`


def warning(kind: str) -> str:
    """How often something did not go as asked, summed over the layers."""
    return f"warnings/{kind}"


def phase_seconds(phase: str) -> str:
    """Seconds of the quantization that a phase took: `calibrate`, `solve` or `propagate`."""
    return f"quantize/{phase}_seconds"


# The calibration's part of the seconds of quantization: the calibration sequences go through each decoder block, to record
# the inputs of its layers, and once more through the quantized block, to become the inputs of the next.
CALIBRATION_PHASES = ("calibrate", "propagate")
CALIBRATION_SECONDS_WORDS = "of them calibration"


def calibration_seconds(metrics: Mapping[Any, Any]) -> float | None:
    """How many of the seconds of quantization the calibration took; None where that was not measured."""
    known = [_present(metrics.get(phase_seconds(phase))) for phase in CALIBRATION_PHASES]
    found = [float(seconds) for seconds in known if seconds is not None]
    return sum(found) if found else None


def keys_of(keys: Iterable[Any], family: str) -> list[str]:
    """The keys of a family, each once, in order: `keys_of(metrics, "ppl")` are those of the perplexities."""
    return list(dict.fromkeys(key for key in keys if isinstance(key, str) and key.startswith(f"{family}/")))


def names(keys: Iterable[Any], family: str) -> list[str]:
    """The names in the keys of a family, each once, in order: `names(metrics, "ppl")` are the texts that were measured."""
    return [key.removeprefix(f"{family}/") for key in keys_of(keys, family)]


def zero_shot_parts(key: Any) -> tuple[str, str] | None:
    """Task and metric of a key made by `zero_shot`; None for any other key."""
    parts = key.split("/") if isinstance(key, str) else []
    return (parts[1], parts[2]) if len(parts) == 3 and parts[0] == "zero_shot" else None


ELSEWHERE = " (elsewhere)"  # after the method of a checkpoint that was quantized elsewhere


def stored_note(metrics: Mapping[str, Any]) -> str | None:
    """The sentence on a checkpoint that was quantized elsewhere; None for any other run."""
    if metrics["method"] != STORED or _present(metrics.get(STORED_LAYOUT)) is None:
        return None
    who, layout = method_words(metrics), metrics[STORED_LAYOUT]
    return f"{who}: {metrics['model']} was quantized elsewhere and measured as it is stored, {layout}"


_SHORT_DTYPES = {"float16": REFERENCE, "bfloat16": "bf16", "float32": "fp32"}
REFERENCE_WORDS = frozenset(_SHORT_DTYPES.values())  # all that tables call the unquantized model


def method_words(metrics: Mapping[str, Any]) -> str:
    """The method of a run as tables name it: the unquantized model by its dtype, `bf16`; `fp16` where that is unknown."""
    if metrics["method"] == STORED:
        return f"{_present(metrics.get(STORED_METHOD)) or STORED}{ELSEWHERE}"
    if metrics["method"] != REFERENCE:
        return metrics["method"]
    return _SHORT_DTYPES.get(str(metrics.get(MODEL_DTYPE)), REFERENCE)


MOST_BITS_ABOVE = 1.0  # bits per weight above its own bits from which on a run is no rival of others of its bits
FAR_MORE_BITS = "‡"  # marks such a run in tables
FAR_MORE_NOTE = (
    f"stores over {MOST_BITS_ABOVE:g} bit per weight more than its bits: "
    "compare it with methods of as many bits per weight"
)


def stores_far_more(metrics: Mapping[str, Any]) -> bool:
    """Whether a run stores far more per weight than the bits that it was asked for, as SpQR may at 2 bits."""
    bits, stored = _present(metrics.get("bits")), _present(metrics.get(BITS_PER_WEIGHT))
    return None not in (bits, stored) and metrics["method"] != REFERENCE and stored > bits + MOST_BITS_ABOVE


def fallback_note(metrics: Mapping[str, Any]) -> str | None:
    """A sentence about the layers that the method was not given, as calibration reached them too little; None: no such."""
    taken, count = _present(metrics.get(warning("fallback"))), _present(metrics.get(LAYER_COUNT))
    if taken:
        kept = metrics.get(FALLBACK) == FALLBACK_KEEP
        what = "keep the weights of the unquantized model" if kept else "are rounded to nearest"
        return f"{taken:g} of {count:g} layers {what}, as calibration reached them too little (`fallback`: layers.csv)"
    left = _present(metrics.get(warning("left_alone")))
    if taken is None and left and metrics.get(CALIBRATION) != UNCALIBRATED:
        return (
            f"{left:g} of {count:g} matrices keep the weights of the unquantized model; in results of this age these may "
            "be layers that calibration did not reach"
        )
    return None


def peak_memory_gb(metrics: Mapping[str, Any]) -> float | None:
    """The largest memory that any stage of a run has taken, in GB of 10^9 bytes; None where none was measured."""
    stages = (_present(metrics.get(key)) for key in (QUANTIZE_MEMORY, EVALUATE_MEMORY, ZERO_SHOT_MEMORY))
    return max((float(peak) for peak in stages if peak is not None), default=None)


MIXED = "layers"  # how the layers of a run are treated that are not treated alike, in words; absent from all other runs
CALIBRATION_NAME = "calibration.name"  # among the settings of a run
UNCALIBRATED = "none"  # the name of the calibration of runs without any: they have no layer errors
GRID_FORMAT = "grid_format"  # the name of the levels that a run has looked up; absent where codes are whole numbers
TRANSFORM = "transform"  # the name of what was done to the layers before the method; absent where nothing was
COLUMN_ORDER = "column_order"  # absent where act-order, if any, sorts all columns; WITHIN_GROUPS: inside grid groups
WITHIN_GROUPS = "within groups"
OWN_GRID = "its own"
PER_CHANNEL = "per-channel"
UNIFORM, LENGTH_ONE = "uniform", "length_one"  # token weights
LENGTH_ONE_WORDS = "length-one tokens"


def grid_words(metrics: Mapping[str, Any]) -> str:
    """The grid of a run in words, without its bits, and how the solver was asked to see the layer.

    `group 64 symmetric act-order length-one tokens`, `nf4 group 64`; "" for the unquantized model.
    """
    if metrics["method"] == REFERENCE:
        return ""
    group_size = _present(metrics.get("group_size"))
    length_one = metrics.get(TOKEN_WEIGHTS) == LENGTH_ONE
    treated = _present(metrics.get(MIXED))
    mixed = "" if treated is None else f" mixed ({treated})"
    if group_size is None and metrics["method"].startswith("spqr"):
        # two-level groups, of 16 columns unless the method's settings say otherwise
        words = [OWN_GRID, *[LENGTH_ONE_WORDS] * length_one, *filter(None, [_present(metrics.get(TRANSFORM))])]
        return " ".join(words) + mixed
    grid, transform = _present(metrics.get(STORED_GRID)), _present(metrics.get(TRANSFORM))
    flags = {
        str(grid): grid not in (None, INT),
        "symmetric": _present(metrics.get("symmetric")),
        "mse": metrics.get("grid_range") == "mse",
        "act-order": _present(metrics.get("act_order")),
        WITHIN_GROUPS: _present(metrics.get(COLUMN_ORDER)) is not None,
        LENGTH_ONE_WORDS: length_one,
        str(transform): transform is not None,
    }
    kind = [] if (name := _present(metrics.get(GRID_FORMAT))) is None else [name]
    return " ".join([*kind, group_words(group_size), *(word for word, is_set in flags.items() if is_set)]) + mixed


BOS_IN_EVERY_WINDOW, NO_BOS = ", BOS in every window", ", no BOS"  # how the names of protocols with such BOS end


def base_protocol(name: str) -> str:
    """A protocol without what is said of BOS, which depends on the model. Its own name may have commas, too."""
    return name.removesuffix(BOS_IN_EVERY_WINDOW).removesuffix(NO_BOS)


def group_words(group_size: float | None) -> str:
    """`group 64`; `per-channel` for None, where a whole output row shares one scale."""
    return PER_CHANNEL if group_size is None else f"group {group_size:g}"


FAR_WORSE = 1.2  # from this ratio of perplexities on, a window without BOS is far worse than with it


def bos_warning(metrics: Mapping[str, Any]) -> str | None:
    """A sentence where the unquantized model is far worse without BOS in a window than with it; None where it is not."""
    without, with_it = metrics.get(PPL_WITHOUT_BOS), metrics.get(PPL_WITH_BOS)
    if without is None or with_it is None or without < FAR_WORSE * with_it:
        return None
    return (
        f"on one window the unquantized model has a perplexity of {without:.2f} without BOS and of {with_it:.2f} with it: "
        "evaluation.bos=window calibration.bos=window gives it to every window"
    )


def model_words(runs: Iterable[Mapping[str, Any]]) -> list[str]:
    """The name of each run's model; where models of several paths share the name, with what tells them apart.

    `toy [4cdaf985]` and `toy [91fe0b27]` for two folders, `opt-125m [facebook-opt-125m]` for a model of the hub.
    """
    pairs = [(str(run["model"]), _present(run.get(MODEL_PATH))) for run in runs]
    known = {pair for pair in pairs if pair[1] is not None}
    shared = {name for name, count in Counter(name for name, _ in known).items() if count > 1}
    return [f"{name} [{_short_path(path)}]" if name in shared and path else name for name, path in pairs]


def _short_path(path: str) -> str:
    """The first digits of a fingerprint; a name on the hub without its slash, as figures have the name in their files'."""
    return path[:8] if re.fullmatch("[0-9a-f]{16}", path) else path.replace("/", "-")


def bits_text(bits: float) -> str:
    """`3`; `3.33` of layers of unlike bits."""
    return f"{round(bits, 2):g}"


def bits_words(bits: float) -> str:
    """`3 bits`."""
    return f"{bits_text(bits)} bits"


def bits_of(metrics: Mapping[str, Any]) -> str:
    """The bits of a run in a table, `3`; `3.33 mixed` where its layers are not treated alike; "" for full precision."""
    bits = _present(metrics.get("bits"))
    mark = "" if _present(metrics.get(MIXED)) is None else " mixed"
    return "" if bits is None else f"{bits_text(bits)}{mark}"


def status_counts(statuses: Iterable[str]) -> str:
    """How many there are of each status, the best first: `3 done, 1 failed, 2 missing`; "" for none at all."""
    found = Counter(statuses)
    return ", ".join(f"{found[status]} {status}" for status in _BEST_FIRST if found[status])


def _present(value: Any) -> Any:
    """The value; None where a table of several runs has a gap (pandas makes it NaN)."""
    return None if isinstance(value, float) and math.isnan(value) else value


# What the validator asks of a value, by its key or by the beginning of its key.
_COUNTS = ("group_size", "seed", "parameters")
_NUMBERS = ("bits", BITS_PER_WEIGHT, BITS_PER_PARAMETER, OUTLIER_RATIO, RUN_SECONDS)
_MEASURED = ("ppl/", "windows/", "layers/", "quantize/", "evaluate/", "warnings/", "agreement/", "zero_shot/")
_NOT_MEASURED = ("/version", "/sha256")  # endings of keys that tell how something was measured
_TEXTS = (
    "digest",
    "series",
    "study",
    CALIBRATION,
    CALIBRATION_INPUTS,
    CALIBRATION_NOTE,
    TOKEN_WEIGHTS,
    FALLBACK,
    "grid_range",
    GRID_FORMAT,
    TRANSFORM,
    COLUMN_ORDER,
    MIXED,
    "stage",
    "error",
    MODEL_DTYPE,
    MODEL_PATH,
    STORED_METHOD,
    STORED_LAYOUT,
    STORED_GRID,
)
_TRUTHS = ("symmetric", "act_order")


def parse(text: str) -> dict[str, Any]:
    """The content of a `metrics.json`, which may be truncated, edited, or no result at all.

    Raises:
        ValueError: it is not JSON, or not the metrics of a run; the message tells what is wrong with it.
    """
    try:
        metrics = json.loads(text, parse_constant=_refuse_constant)
        _check(metrics)
        if SEAL in metrics:
            _check_text(text, metrics[SEAL])
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return metrics


def sealed_text(metrics: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> str:
    """The content of a `metrics.json` with its seal: the facts of the run's other files, and a checksum of this text itself.

    Args:
        files: by the name of a file its BYTES, CHECKSUM and ROWS.

    Raises:
        ValueError: a number is none that JSON has.
    """
    whole = {key: value for key, value in metrics.items() if key != SEAL}
    whole[SEAL] = {SEALED_FILES: files, CHECKSUM: ""}  # last, so that the last "" of the text is the checksum's place
    head, _, tail = (json.dumps(whole, indent=2, allow_nan=False) + "\n").rpartition('""')
    return f'{head}"{_checksum(head, tail)}"{tail}'


def _check_text(text: str, seal: Mapping[str, Any]) -> None:
    head, is_there, tail = text.rpartition(f'"{seal.get(CHECKSUM)}"')
    if not is_there or _checksum(head, tail) != seal[CHECKSUM]:
        raise ValueError("its checksum is another than its text has: it was changed since the run ended")


def _checksum(head: str, tail: str) -> str:
    """Of the text around the checksum."""
    return sha256_of(f'{head}""{tail}'.encode()).hexdigest()


def read(file: Path) -> dict[str, Any]:
    """The metrics of one run. Its other files are not looked at: `runners.results.seal.read_run` does that.

    Raises:
        FileNotFoundError: the run has not ended.
        NotADirectoryError: the same, where a file has the name of the run's folder.
        ValueError: the file is damaged; a sentence with its name and the remedy.
    """
    try:
        return parse(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (OSError, ValueError) as error:
        raise ValueError(damaged(file, error)) from error


def damaged(file: Path, what: object) -> str:
    """The sentence on a file of a run that is not what the run has written, with the remedy."""
    return f"{file} is damaged ({what}): restore it, from git or a copy, or run it again with force=true"


def _check(metrics: Any) -> None:
    if not isinstance(metrics, dict) or metrics.get("status") not in ENDED:
        raise ValueError(f"it is not the metrics of a run: there is no status {', '.join(ENDED)}")
    for key in ("method", "model", *_needed(metrics)):
        if metrics.get(key) is None:
            raise ValueError(f"{key} is missing")
    for key, value in metrics.items():
        if not _fits(key, value):
            raise ValueError(f"{key} cannot be {json.dumps(value)[:80]}")
    if MIXED not in metrics and isinstance(metrics.get("bits"), float):
        raise ValueError(f"bits cannot be {metrics['bits']}: only the mean of unlike layers is a fraction")
    for text in names(metrics, "protocol"):
        if windows(text) not in metrics:
            raise ValueError(f"{protocol(text)} is there without {windows(text)}")


def _needed(metrics: dict[str, Any]) -> tuple[str, ...]:
    """The keys without which tables cannot show such a run."""
    if metrics["status"] != Status.DONE:
        return ("stage", "error")
    has_errors = metrics.get(CALIBRATION) != UNCALIBRATED and metrics.get("method") != STORED
    errors = (RELATIVE_ERROR,) if has_errors else ()
    return (BITS_PER_WEIGHT, *errors, *(() if metrics.get("method") == REFERENCE else ("bits",)))


def _fits(key: str, value: Any) -> bool:
    if key == SEAL:
        return isinstance(value, dict) and _is_table(value.get(SEALED_FILES))
    if key in _NUMBERS or (key.startswith(_MEASURED) and not key.endswith(_NOT_MEASURED)):
        # What was not measured has no key, so None is damage. `type` and not isinstance: True is an int, too.
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    if value is None:
        return key != "parameters"  # absent where a run has none; other labels may be null
    if key in _COUNTS:
        return type(value) is int and abs(value) < 2**63  # what a column of a table holds
    if key in _TRUTHS:
        return isinstance(value, bool)
    if key in ("method", "model", *_TEXTS) or key.startswith(("protocol/", "bos/", "sha256/", "skipped/")):
        return isinstance(value, str)
    return not isinstance(value, dict | list)


def _is_table(files: Any) -> bool:
    """Whether a value can be what the seal says of files."""
    facts = files.values() if isinstance(files, dict) else [None]
    return all(isinstance(entry, dict) and {BYTES, CHECKSUM} <= entry.keys() for entry in facts)


def _refuse_constant(constant: str) -> NoReturn:
    """JSON has no NaN and no Infinity, but Python's reader takes them unless it is told otherwise."""
    raise ValueError(f"{constant} is not a number of JSON")
