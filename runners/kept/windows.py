"""The windows of a text that a finished run was evaluated on."""

import logging

from torch import Tensor

from runners.data.bos import resolve_bos
from runners.data.windows import cut_windows
from runners.errors import InputError, known_names
from runners.kept.run import KeptRun
from runners.models.checkpoint import load_tokenizer
from runners.results import metrics

log = logging.getLogger(__name__)


def first_windows(
    kept: KeptRun, text: str | None, count: int, length: int | None, data_root: str | None
) -> tuple[str, Tensor]:
    """The first windows of a text.

    Args:
        text: its name among the texts of the run's evaluation; None: the first that the run has a perplexity on.
        count: of windows; a text may have fewer.
        length: tokens of a window; None: as in the run.
        data_root: folder of the data sets; None: as in the run.

    Returns:
        The name of the text, and token ids (windows, length).

    Raises:
        InputError: there is no such text, its data are missing or damaged, or it is shorter than one window.
    """
    name = _name(kept, text)
    longest = kept.checkpoint.sequence_length
    if length is not None and not 2 <= length <= longest:
        raise InputError(f"length must be from 2 to the {longest} tokens of the run's windows, not {length}")
    evaluation, tokenizer = kept.settings.evaluation, load_tokenizer(kept.checkpoint)
    bos = resolve_bos(evaluation.bos, tokenizer, kept.checkpoint.config.model_type)
    root = data_root or kept.settings.data_root
    windows = cut_windows(name, evaluation.texts[name], tokenizer, length or longest, root, bos)
    known = kept.metrics.get(metrics.sha256(name))
    if length in (None, longest) and known not in (None, windows.sha256):
        log.warning(
            "the text %s is not the one that the run was evaluated on (the hash of its tokens is %s, was %s): this command "
            "measures on what is here now",
            name,
            windows.sha256,
            known,
        )
    return name, windows.ids[:count]


def _name(kept: KeptRun, text: str | None) -> str:
    texts = kept.settings.evaluation.texts
    measured = [name for name in metrics.names(kept.metrics, "ppl") if name in texts]
    if text is None and not measured:
        raise InputError("the run has measured no perplexity: name one of its texts with text=NAME")
    name = measured[0] if text is None else text
    if name not in texts:
        raise InputError(f"the run was not evaluated on a text {name}: {known_names(name, texts)}")
    return name
