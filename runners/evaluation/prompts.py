"""Build and encode all zero-shot prompts in preflight, as lm-eval will for the measurement.

A request that the model cannot take would fail after hours of calibration, or give a wrong number. So all requests of all
tasks are built here, encoded by lm-eval's own code, and checked. The requests are kept and measured later, so the prompts
that were checked are the prompts that are asked.

On one CPU core 1,000 requests take 0.1 to 0.3 seconds to encode and 0.2 to 1.8 to build. The building is moved here, not
added: it is not repeated for the measurement.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from runners.errors import InputError
from runners.evaluation.tasks import ReadyTask, explain_failure, set_seeds, silence

if TYPE_CHECKING:
    from runners.evaluation.lm_eval_model import LmEvalEncoder

log = logging.getLogger(__name__)


@dataclass
class CheckedTasks:
    """What the check of all prompts has found.

    Attributes:
        tasks: those that can be measured, with their requests.
        skipped: why the others cannot, in a sentence each, by the task's name.
        largest_id: the largest token id of all prompts; 0 without prompts.
    """

    tasks: list[ReadyTask] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    largest_id: int = 0


class _Unusable(InputError):
    """A task has requests that cannot be measured right. The message says which and why."""


def check_prompts(
    tasks: Sequence[ReadyTask], tokenizer: PreTrainedTokenizerBase, config: Any, *, length: int, limit: int | None
) -> CheckedTasks:
    """Build and encode the requests of all tasks, and keep the tasks whose requests the model can take.

    A task with one unusable request is skipped as a whole, because without it the accuracy would be of other questions.

    Args:
        config: of the model, as transformers has it.
        length: tokens of the longest sequence that the model takes.
        limit: ask only the first questions of each task, this many; None: all.
    """
    checked = CheckedTasks()
    if not tasks:
        return checked
    from runners.evaluation.lm_eval_model import LmEvalEncoder  # here, because importing lm-eval takes 3 seconds

    with silence():
        encoder = LmEvalEncoder(config, tokenizer, length)
    for task in tasks:
        try:
            with silence():
                truncated, largest = _check(task, encoder, limit)
        except _Unusable as error:
            checked.skipped[task.name] = str(error)
            continue
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic in the Rust library `tokenizers` is not an Exception
            checked.skipped[task.name] = explain_failure("build and encode its prompts", error)
            continue
        if truncated:
            what = f"{sum(truncated.values())} of its prompts are longer than the {length} tokens of the model"
            log.warning("%s: %s, which will not see their beginning", task.name, what)
        checked.tasks.append(replace(task, truncated=truncated))
        checked.largest_id = max(checked.largest_id, largest)
    return checked


def _check(task: ReadyTask, encoder: "LmEvalEncoder", limit: int | None) -> tuple[dict[str, int], int]:
    """Check all requests of a task.

    Returns:
        How many requests are truncated, by the member's name where there are any; and the largest token id.

    Raises:
        _Unusable: the tokenizer does not suit lm-eval, or a request cannot be asked.
    """
    _check_special_tokens(encoder)
    truncated, largest = {}, 0
    for name, member in task.loaded["tasks"].items():
        _build_once(member, limit)
        faults = []
        for request in member.instances:
            pieces = encoder.encode(request)
            fault = "has no tokens" if not pieces else next(filter(None, (piece.fault for piece in pieces)), None)
            if fault is not None:
                faults.append(f"question {request.doc_id + 1} {fault}")
            truncated[name] = truncated.get(name, 0) + any(piece.is_truncated for piece in pieces)
            largest = max(largest, *(max(piece.ids, default=0) for piece in pieces), 0)
        if faults:
            raise _Unusable(
                f"{len(faults)} of the {len(member.instances)} requests of {name} cannot be measured: {faults[0]}"
            )
    return {name: count for name, count in truncated.items() if count}, largest


def _build_once(task: Any, limit: int | None) -> None:
    """Build the requests of a task and have lm-eval's `evaluate` use them, where it would build them again.

    Its examples for few-shot prompts come from a generator that has moved on, so built again they would be other prompts.
    lm-eval 0.4.13 has no public way to pass requests but a cache of pickles on disk.
    """
    set_seeds()
    task.build_all_requests(limit=limit)

    def reuse(**_: Any) -> None:
        for request in task.instances:
            request.resps.clear()  # of an earlier measurement: lm-eval appends to them

    task.build_all_requests = reuse


def _check_special_tokens(encoder: "LmEvalEncoder") -> None:
    """Refuse tokenizers whose special tokens lm-eval cannot handle.

    lm-eval takes as answer the tokens of prompt and answer together that come after as many tokens as the prompt alone has.
    A BOS token in front of both does no harm. An EOS token behind both does: the first token of the answer is then left
    out, and the EOS token counted in its place.

    Raises:
        _Unusable: the tokenizer has neither BOS nor EOS, or puts special tokens behind a text.
    """
    if encoder.prefix_token_id is None:
        raise _Unusable(
            "the tokenizer has neither a BOS nor an EOS token, and lm-eval needs one to begin prompts with: add bos_token "
            "or eos_token to tokenizer_config.json"
        )
    plain = encoder.tok_encode("a", add_special_tokens=False)
    if plain and encoder.tok_encode("a")[-1] != plain[-1]:
        raise _Unusable(
            "the tokenizer puts a special token behind every text, so lm-eval would cut each answer one token late: set "
            "add_eos_token to false in tokenizer_config.json, or take it out of the post_processor in tokenizer.json"
        )
