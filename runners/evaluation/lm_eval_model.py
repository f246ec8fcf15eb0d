"""The model as lm-eval wants it. Importing this module takes 3 seconds, so only runs with zero-shot tasks do."""

from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any, TextIO

import torch
from lm_eval.models import huggingface
from transformers import PreTrainedTokenizerBase

from runners.console import progress

HFLM: Any = huggingface.HFLM  # Any, because a decorator of lm-eval hides the arguments from type checkers


class LmEvalModel(HFLM):
    """lm-eval's wrapper of a model, with the progress bar of this project and batches of a constant number of tokens.

    Args:
        length: tokens of the longest sequence that the model takes.
        batch_size: sequences of that length that go through the model at once; of shorter ones more do.
        terminal: where the progress bar is drawn, because `sys.stdout` is redirected while lm-eval works.

    Attributes:
        title: text of the progress bar.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, length: int, batch_size: int, terminal: TextIO
    ) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            max_length=length,
            batch_size=batch_size,
            # With its cache, lm-eval 0.4.13 gives wrong likelihoods: of two requests with the same tokens but another cut
            # between context and continuation, one gets the other's. A task's number then depends on the tasks beside it.
            logits_cache=False,
            # By default softmax is in the model's format, and in half precision the rounding decides between near ties.
            softmax_dtype="float32",
        )
        self.title = "zero-shot"
        self._tokens = batch_size * length
        self._terminal = terminal
        self._step: Callable[[str], None] = lambda _: None

    # lm-eval passes no `disable_tqdm`, so the defaults of these two methods are changed: there is one progress bar, ours.
    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:  # noqa: ARG002
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = True,  # noqa: ARG002
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        # lm-eval sorts requests by length and gives all batches the same number of sequences: sized for the longest request,
        # no batch has more than `batch_size * length` tokens.
        longest = max(len(context) + len(continuation) for _, context, continuation in requests)
        self.batch_size_per_gpu = max(1, self._tokens // min(longest, self.max_length))
        with redirect_stdout(self._terminal), progress(self.title, len(requests)) as self._step:
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def _model_call(self, inps: torch.Tensor, *arguments: Any, **settings: Any) -> torch.Tensor:
        for _ in inps:  # one step per sequence: lm-eval calls the model once per batch
            self._step(self.title)
        return super()._model_call(inps, *arguments, **settings)
