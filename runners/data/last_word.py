"""A zero-shot task that needs no download: predict the last word of a passage of documentation.

It is LAMBADA's question (https://arxiv.org/abs/1606.06031) on documentation that the bundled model was not trained on. A
passage ends with the end of a sentence, and its last word occurs earlier in the passage, so the context can tell it. It is
measured under lm-eval's own definition of `lambada_openai`.

The passages depend on the version of Python; the hash of the prompts is stored with the results.
"""

import re
from collections.abc import Iterator

from runners.data.stdlib import documents

# The last word has at least three letters, because "is." or "it." could be guessed from grammar alone. White space must
# precede it, so that neither `os.path.` nor (this) counts.
SENTENCE_END = re.compile(r"(?<=\s)([A-Za-z]{3,})[.!?](?=\s|$)")
WORD = re.compile(r"[A-Za-z]+")
# Fewest and most words of a context. LAMBADA's 5,153 test passages have 31 to 180 words, 59 on average and nine tenths of
# them 44 to 80 (counted in EleutherAI/lambada_openai).
SHORTEST, LONGEST = 30, 100


def last_word_rows() -> list[dict[str, str]]:
    """The passages in the order of their documents, as rows of LAMBADA (column `text`), each passage once.

    Raises:
        InputError: this Python has no readable standard library.
    """
    passages = (passage for document in documents("docs", "evaluation") for passage in _passages(document.text))
    # Each passage once: some modules share docstrings word for word, and a repeated passage would count twice.
    return [{"text": passage} for passage in dict.fromkeys(passages)]


def _passages(text: str) -> Iterator[str]:
    """Passages of one document that do not overlap.

    A single space precedes the last word, because lm-eval splits a row of LAMBADA into context and answer at its last space.
    """
    start = 0
    for end in SENTENCE_END.finditer(text):
        context = _last_words(text[start : end.start(1)])
        words = WORD.findall(context)
        if len(words) >= SHORTEST and end[1] in words:
            yield f"{context} {end[1]}"
            start = end.end()


def _last_words(text: str) -> str:
    """The last words of a text, at most `LONGEST`, with the white space between them as it is."""
    starts = [word.start() for word in re.finditer(r"\S+", text)]
    return text[starts[-LONGEST] if len(starts) >= LONGEST else 0 :].strip()
