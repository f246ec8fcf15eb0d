"""Zero-shot accuracy through lm-eval (https://github.com/EleutherAI/lm-evaluation-harness), with the whole model in memory.

Prompts, choices and metrics of the tasks are lm-eval's. Each task is measured in a call of its own, so its number does not
depend on which other tasks are measured. The hash of all prompts is stored with the numbers: only numbers of the same
prompts may be compared.
"""

import json
import logging
import math
import sys
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from runners.errors import InputError
from runners.evaluation.tasks import ReadyTask, explain_failure, silence
from runners.models.blocks import InMemoryModel, replace_weights
from runners.models.checkpoint import Checkpoint, Model, load
from runners.models.memory import out_of_memory
from runners.quantization.finished_blocks import FinishedBlocks
from runners.results.metrics import OUT_OF_MEMORY, skipped, zero_shot

# Of the bootstrap, for standard errors without a closed form (perplexities). lm-eval's default of 100,000 takes 2 seconds
# per task; with 1,000 the standard error is itself uncertain by 2 % (1 / sqrt(2 * 1000)), enough for what tables show.
RESAMPLES = 1000

log = logging.getLogger(__name__)


def measure_tasks(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[ReadyTask],
    *,
    length: int,
    batch_size: int,
    limit: int | None = None,
) -> dict[str, Any]:
    """Measure a model on tasks. Of lm-eval nothing is printed: the lines on progress are ours.

    Args:
        model: a causal language model of transformers.
        length: tokens of the longest sequence that the model takes; of a longer prompt the last ones are kept.
        batch_size: sequences of that length that go through the model at once; of shorter ones more do.
        limit: ask only the first questions of each task, this many; None: all.

    Returns:
        `zero_shot/<task>/<metric>` and `<metric>_stderr`, for each task also `samples`, `version`, `sha256` and, where
        the beginnings of prompts were cut, `truncated`; or `skipped/<task>` with the reason where something failed.
    """
    if not tasks:
        return {}
    from lm_eval import evaluate  # here and below, because importing lm-eval takes 3 seconds

    from runners.evaluation.lm_eval_model import LmEvalModel

    terminal = sys.stdout
    with silence():
        lm = LmEvalModel(model, tokenizer, length, batch_size, terminal)
    metrics: dict[str, Any] = {}
    for task in tasks:
        lm.title = f"zero-shot {task.name}"
        try:
            with silence():
                results = evaluate(lm, task.loaded, limit=limit, bootstrap_iters=RESAMPLES, log_samples=False)
            metrics |= _metrics(task, results)
        except Exception as error:  # one task must cost neither the others nor the perplexities
            metrics |= skip_tasks([task], error)
    return metrics


def skip_tasks(tasks: Sequence[ReadyTask], error: Exception) -> dict[str, Any]:
    """The metrics of tasks that were not measured because of an error: `skipped/<task>` with the reason, in a sentence."""
    log.debug("", exc_info=error)
    if isinstance(error, InputError):
        reason = str(error)
    elif out_of_memory(error):
        error.__traceback__ = None  # its frames hold the tensors that did not fit, and the next task needs their memory
        reason = OUT_OF_MEMORY
    else:
        reason = explain_failure("measure it", error)
    for task in tasks:
        log.warning("%s is skipped: %s", task.name, reason)
    return {skipped(task.name): reason for task in tasks}


def _metrics(task: ReadyTask, results: Any) -> dict[str, Any]:
    """The metrics of a task from what lm-eval's `evaluate` returns."""
    if broken := _not_finite(task):
        return {skipped(task.name): f"{broken} of the likelihoods that the model gives are NaN or infinite"}
    metrics: dict[str, Any] = {}
    for name, values in results["results"].items():
        metrics |= _numbers(name, values)
    for name, member in task.loaded["tasks"].items():
        metrics[zero_shot(name, "samples")] = results["n-samples"][name]["effective"]
        metrics[zero_shot(name, "version")] = _version(member, results["versions"].get(name))
        metrics[zero_shot(name, "sha256")] = prompts_hash(member)
        if name in task.truncated:
            metrics[zero_shot(name, "truncated")] = task.truncated[name]
    return metrics


def whole_model(checkpoint: Checkpoint, model: Model, device: torch.device, blocks: FinishedBlocks | None) -> Any:
    """The whole model in memory, because lm-eval calls it as a whole; with quantized weights if `blocks` is not None.

    Raises:
        InputError: as for `open_model`.
    """
    source = InMemoryModel(load(checkpoint, model, device))
    if blocks is not None:
        for index, block in enumerate(source.blocks):
            replace_weights(block, blocks.layers(index, str(device)))
    return source.model


def prompts_hash(task: Any) -> str:
    """Hash of all requests of a task, in order: contexts and continuations, or what else its kind of request has.

    Returns:
        The first 16 hexadecimal digits of SHA-256. A value that JSON cannot write enters as its text.
    """
    digest = sha256()
    for request in task.instances:
        digest.update(json.dumps(request.args, default=str).encode())
    return digest.hexdigest()[:16]


def _numbers(task: str, values: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's results of one task under the keys of this project.

    `acc,none` becomes `acc` and `acc_stderr,none` becomes `acc_stderr`; another filter than `none` becomes part of the
    name. Texts are left out: lm-eval writes "N/A" for a standard error that does not exist, and the task's name.
    """
    numbers: dict[str, Any] = {}
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        if comma and isinstance(value, int | float | np.number):
            error = "_stderr" * metric.endswith("_stderr")
            name = metric.removesuffix("_stderr") + f"_{chosen}" * (chosen != "none") + error
            numbers[zero_shot(task, name)] = float(value)
    return numbers


def _not_finite(task: ReadyTask) -> int:
    """How many log-likelihoods are NaN or infinite: of these lm-eval would take the first choice, and report an accuracy."""
    requests = (request for one in task.loaded["tasks"].values() for request in one.instances)
    answers = (answer[0] if isinstance(answer, tuple) else answer for request in requests for answer in request.resps)
    return sum(isinstance(answer, float) and not math.isfinite(answer) for answer in answers)


def _version(task: Any, version: Any) -> str:
    """The version of a task's definition, followed by any deviation from what its name promises."""
    answer = str(version)
    if shots := task.get_config("num_fewshot"):
        answer += f" ({shots} shots)"  # the definition of the task asks for them: not zero-shot
    if task.config.task == "hellaswag" and not any(task.dataset["validation"]["ctx_b"]):
        # The hub has the last part of a context in a column of its own (ctx_b), which lm-eval begins with a capital letter.
        # In copies of the data set without that column's content, the prompts differ from the published ones.
        answer += " (contexts not split)"
    return answer
