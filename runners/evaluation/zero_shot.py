"""Zero-shot accuracy through lm-eval (https://github.com/EleutherAI/lm-evaluation-harness), the model in memory.

Tasks are lm-eval's own: their prompts, choices and metrics. Each is measured in a call of its own, and without lm-eval's
cache of logits, which gives requests that share tokens, but are cut at different places, the likelihoods of each other
(0.4.13); so a number does not depend on what else is measured. Log-probabilities are taken in float32 whatever
the model's format, because the accuracies of near ties would depend on its rounding. The hash of all prompts is stored with
the numbers: only those of the same prompts may be compared.
"""

import json
import math
import sys
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from runners.evaluation.tasks import ReadyTask, silence
from runners.models.blocks import InMemoryModel, replace_weights
from runners.models.checkpoint import Checkpoint, Model, load
from runners.quantization.finished_blocks import FinishedBlocks
from runners.results.metrics import skipped, zero_shot

RESAMPLES = 1000  # of the bootstrap, for the standard errors that have no closed form: perplexities


def measure_tasks(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[ReadyTask],
    *,
    length: int,
    batch_size: int,
    limit: int | None = None,
) -> dict[str, Any]:
    """Measure a model on tasks.

    Args:
        length: tokens of the longest sequence that the model takes; of a longer prompt the end is kept.
        batch_size: how many sequences of that length go through the model at once; of shorter ones more do.
        limit: take only the first so many questions of each task.

    Returns:
        `zero_shot/<task>/<metric>` and `<metric>_stderr`, and of each task `samples`, `version` and `sha256`.
    """
    if not tasks:
        return {}
    from lm_eval import evaluate

    from runners.evaluation.lm_eval_model import LmEvalModel

    terminal = sys.stdout
    with silence():
        lm = LmEvalModel(model, tokenizer, length, batch_size, terminal)
    metrics: dict[str, Any] = {}
    for task in tasks:
        lm.title = f"zero-shot  {task.name}"
        with silence():
            results: Any = evaluate(lm, task.loaded, limit=limit, bootstrap_iters=RESAMPLES, log_samples=False)
        if broken := _not_finite(task):
            metrics[skipped(task.name)] = f"{broken} of the likelihoods that the model gives are NaN or infinite"
            continue
        for name, values in results["results"].items():
            metrics |= _numbers(name, values)
        for name, one in task.loaded["tasks"].items():
            metrics[zero_shot(name, "samples")] = results["n-samples"][name]["effective"]
            metrics[zero_shot(name, "version")] = _version(one, results["versions"].get(name))
            metrics[zero_shot(name, "sha256")] = prompts_hash(one)
    return metrics


def whole_model(checkpoint: Checkpoint, model: Model, device: torch.device, blocks: FinishedBlocks | None) -> Any:
    """The model in memory as a whole, with the weights of its quantized `blocks` where there are any.

    Raises:
        InputError: as for `open_model`.
    """
    source = InMemoryModel(load(checkpoint, model, device))
    if blocks is not None:
        for index, block in enumerate(source.blocks):
            replace_weights(block, blocks.layers(index, str(device)))
    return source.model


def prompts_hash(task: Any) -> str:
    """A hash of all that a task has asked: contexts and continuations, in order."""
    digest = sha256()
    for request in task.instances:
        digest.update(json.dumps(request.args, default=str).encode())
    return digest.hexdigest()[:16]


def _numbers(task: str, values: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's `acc,none` and `acc_stderr,none` as metrics of ours; it gives a text where there is no standard error."""
    numbers: dict[str, Any] = {}
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        if comma and isinstance(value, int | float | np.number):
            error = "_stderr" * metric.endswith("_stderr")
            name = metric.removesuffix("_stderr") + f"_{chosen}" * (chosen != "none") + error
            numbers[zero_shot(task, name)] = float(value)
    return numbers


def _not_finite(task: ReadyTask) -> int:
    """How many log-likelihoods are NaN or infinite. lm-eval would take the first choice and report an accuracy."""
    requests = (request for one in task.loaded["tasks"].values() for request in one.instances)
    answers = (answer[0] if isinstance(answer, tuple) else answer for request in requests for answer in request.resps)
    return sum(isinstance(answer, float) and not math.isfinite(answer) for answer in answers)


def _version(task: Any, version: Any) -> str:
    """The version of a task's definition, with what deviates from its name."""
    answer = str(version)
    if shots := task.get_config("num_fewshot"):
        answer += f" ({shots} shots)"  # as its definition has it: not zero-shot
    if task.config.task == "hellaswag" and not any(task.dataset["validation"]["ctx_b"]):
        answer += " (contexts not split)"  # the hub has their last part apart, to begin with a capital in the prompt
    return answer
