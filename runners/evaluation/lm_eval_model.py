"""The model, or its tokenizer alone, as lm-eval wants them. Importing this takes 3 seconds: only zero-shot tasks do."""

from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TextIO

import torch
from lm_eval.models import huggingface
from lm_eval.models.utils import normalize_gen_kwargs
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


@dataclass(frozen=True)
class EncodedRequest:
    """Token ids that lm-eval would give to the model for one request, or for one window of a long text.

    Attributes:
        prompt: what the model reads.
        answer: what is scored; None: the model writes it.
        length: tokens of the longest sequence that the model takes.
        room: tokens that prompt and answer may have together; of a longer prompt lm-eval drops the beginning.
    """

    prompt: list[int]
    answer: list[int] | None
    length: int
    room: int

    @property
    def ids(self) -> list[int]:
        """All token ids."""
        return self.prompt + (self.answer or [])

    @property
    def is_truncated(self) -> bool:
        """Whether lm-eval would drop the beginning of the prompt."""
        return len(self.ids) > self.room

    @property
    def fault(self) -> str | None:
        """Why the request cannot be measured, as the end of a sentence; None: it can. lm-eval 0.4.13 asserts the same."""
        remedy = f"than the {self.length} that the model takes: raise model.sequence_length"
        if self.room < 1:
            return f"lets the model write {self.length - self.room} tokens, not fewer {remedy}"
        if not self.prompt:
            return "has a prompt without tokens"
        if self.answer is not None and not self.answer:
            return (
                "has an answer without tokens of its own (it is empty, or its tokens merge with the end of the prompt)"
            )
        if self.answer is not None and len(self.answer) > self.length:
            return f"has an answer of {len(self.answer)} tokens, more {remedy}"
        return None


class LmEvalEncoder(HFLM):
    """lm-eval's wrapper without a model: it encodes requests with lm-eval's own code, and keeps the token ids.

    Args:
        config: of the model, as transformers has it.
        length: tokens of the longest sequence that the model takes.
    """

    def __init__(self, config: Any, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        # Configuration and device are all that lm-eval asks of a model before it calls it.
        model = SimpleNamespace(config=config, device=torch.device("cpu"))
        super().__init__(pretrained=model, tokenizer=tokenizer, max_length=length, batch_size=1, logits_cache=False)
        self._encoded: list[EncodedRequest] = []

    def encode(self, request: Any) -> list[EncodedRequest]:
        """The token ids of one request; of a text whose every token is scored, one element per window."""
        self._encoded = []
        getattr(self, request.request_type)([request], disable_tqdm=True)
        return self._encoded

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        room = self.max_length + 1  # the last token is scored, not read
        self._encoded += [EncodedRequest(prompt, answer, self.max_length, room) for _, prompt, answer in requests]
        return [(0.0, False)] * len(requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:  # noqa: ARG002
        self.tok_decode(self.eot_token_id, skip_special_tokens=False)  # fails without an EOS token, as it would later
        for request in requests:
            context, settings = request.args
            settings = normalize_gen_kwargs(settings, self.max_gen_toks)
            room = self.max_length - settings.get("max_gen_toks", self.max_gen_toks)
            ids, _ = self.tok_batch_encode([context])
            self._encoded.append(EncodedRequest(ids[0].tolist(), None, self.max_length, room))
        return [""] * len(requests)
