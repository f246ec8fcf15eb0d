"""A zero-shot task that every Python carries: guess the last word of a passage of held-out documentation.

It is LAMBADA (https://arxiv.org/abs/1606.06031) on the documentation that the bundled model was not trained on: a passage
ends with a sentence, and the sentence's last word has occurred in the passage before, so that who follows the text can
know it. It is measured as LAMBADA is, under the harness' own definition of `lambada_openai`.

A result depends on the text, so on the version of Python; the hash of the prompts is stored beside it.
"""

import re
from collections.abc import Iterator

from runners.data.stdlib import documents

SENTENCE_END = re.compile(r"(?<=\s)([A-Za-z]{3,})[.!?](?=\s|$)")
WORD = re.compile(r"[A-Za-z]+")
# Words of a passage, around the 75 or so that LAMBADA's passages have on average.
SHORTEST, LONGEST = 30, 100


def last_word_rows() -> list[dict[str, str]]:
    """The passages, in the order of their documents, as rows of LAMBADA.

    Raises:
        InputError: this Python carries no readable standard library.
    """
    passages = (passage for document in documents("docs", "evaluation") for passage in _passages(document.text))
    return [{"text": passage} for passage in dict.fromkeys(passages)]


def _passages(text: str) -> Iterator[str]:
    """Passages that do not overlap. A space stands before the last word, for there the harness cuts."""
    start = 0
    for end in SENTENCE_END.finditer(text):
        context = _last_words(text[start : end.start(1)])
        words = WORD.findall(context)
        if len(words) >= SHORTEST and end[1] in words:
            yield f"{context} {end[1]}"
            start = end.end()


def _last_words(text: str) -> str:
    """The last words of a text, at most `LONGEST`, with the line breaks between them."""
    starts = [word.start() for word in re.finditer(r"\S+", text)]
    return text[starts[-LONGEST] if len(starts) >= LONGEST else 0 :].strip()
