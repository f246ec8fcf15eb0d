"""The model as lm-eval wants it. Importing this takes seconds: only runs with zero-shot tasks do."""

from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any, TextIO

import torch
from lm_eval.models import huggingface
from transformers import PreTrainedTokenizerBase

from runners.console import progress

HFLM: Any = huggingface.HFLM  # whose decorator hides what it takes


class LmEvalModel(HFLM):
    """lm-eval's wrapper of a model, with our progress bar, and batches of as many tokens, however long the prompts are.

    Args:
        length: tokens of the longest sequence that the model takes.
        batch_size: how many sequences of that length go through the model at once.
        terminal: where the bar is drawn, whatever `sys.stdout` is when the model is called.

    Attributes:
        title: what the bar says.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, length: int, batch_size: int, terminal: TextIO
    ) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            max_length=length,
            batch_size=batch_size,
            logits_cache=False,  # it mixes up requests, see runners.evaluation.zero_shot
            softmax_dtype="float32",
        )
        self.title = "zero-shot"
        self._tokens = batch_size * length
        self._terminal = terminal
        self._step: Callable[[str], None] = lambda _: None

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:  # noqa: ARG002
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = True,  # noqa: ARG002
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        longest = max(len(context) + len(continuation) for _, context, continuation in requests)
        self.batch_size_per_gpu = max(1, self._tokens // min(longest, self.max_length))
        with redirect_stdout(self._terminal), progress(self.title, len(requests)) as self._step:
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def _model_call(self, inps: torch.Tensor, *arguments: Any, **settings: Any) -> torch.Tensor:
        for _ in inps:
            self._step(self.title)
        return super()._model_call(inps, *arguments, **settings)
