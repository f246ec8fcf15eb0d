"""The sentences on top of a page: which method has the lowest perplexity, by how much, and how sure that is.

Only *rivals* are ranked (see `analysis.intervals`): series of one model, number of bits and grid that store about as many
bits per weight. Of a model's groups of rivals the largest is told. A difference whose 95 % interval contains zero is none.
"""

from collections import defaultdict

from analysis.intervals import Pair
from analysis.series import Row
from runners.results.metrics import BITS_PER_WEIGHT, bits_words, ppl

NOTHING = (
    "No two methods of this study can be ranked: that takes the same model, bits, grid and windows, "
    "and like bits per weight."
)
TELLING = 3  # bits, where methods separate and models still work: told first of groups that are equally large


def summary_sentences(summary: list[Row], pairs: list[Pair]) -> list[str]:
    """A few sentences for each model and text; one that says so where no two series are rivals.

    Args:
        summary: the series, from `analysis.series.summarize`.
        pairs: those of `analysis.intervals.compare_peers`.
    """
    found = []
    for model in dict.fromkeys(row["model"] for row in summary):
        of_model = [pair for pair in pairs if pair.first["model"] == model]
        if any(pair.rivals for pair in of_model):
            group = _largest_group(of_model)
            for text in dict.fromkeys(pair.text for pair in of_model):
                known = [pair for pair in of_model if pair.text == text]
                found += _told(text, [row for row in group if ppl(text) in row], known, summary)
    return found or [NOTHING]


def _largest_group(pairs: list[Pair]) -> list[Row]:
    """The series with the most rivals, and these; of several the one with more seeds, then near 3 bits."""
    rivals: dict[str, dict[str, Row]] = defaultdict(dict)
    rows: dict[str, Row] = {}
    for pair in (pair for pair in pairs if pair.rivals):
        for one, other in ((pair.first, pair.other), (pair.other, pair.first)):
            rows[one["series"]] = one
            rivals[one["series"]][other["series"]] = other
    center = max(rows, key=lambda name: (len(rivals[name]), rows[name]["seeds"], -abs(rows[name]["bits"] - TELLING)))
    return [rows[center], *rivals[center].values()]


def _told(text: str, group: list[Row], pairs: list[Pair], summary: list[Row]) -> list[str]:
    ratios = {(pair.first["series"], pair.other["series"]): pair for each in pairs for pair in (each, each.swapped())}
    order = sorted(group, key=lambda row: row[ppl(text)])
    if len(order) < 2 or (order[0]["series"], order[1]["series"]) not in ratios:
        return []
    first, second = order[:2]
    bits = [f"{row[BITS_PER_WEIGHT]:.2f}" for row in sorted(group, key=lambda row: row[BITS_PER_WEIGHT])]
    stored = "–".join(dict.fromkeys([bits[0], bits[-1]]))
    head = f"{first['model']} at {bits_words(first['bits'])}, {first['grid']}, on {text}: "
    head += f"of the {len(order)} methods that store {stored} bits per weight, "
    lead = _lead(ratios[first["series"], second["series"]], f"{first[ppl(text)]:.2f}", f"{second[ppl(text)]:.2f}")
    lower = _lower_at_more_bits(first, {row["series"] for row in group}, text, summary)
    return [f"{head}{lead}{lower} {_seeds(first, second)}".replace(" %", "\u00a0%")]


def _lead(pair: Pair, lowest: str, next_lowest: str) -> str:
    """The lowest and the next: by how many per cent, or that they cannot be told apart."""
    first, second, ratio = pair.first["label"], pair.other["label"], pair.ratio
    if ratio.high >= 1:
        return (
            f"{first} ({lowest}) and {second} ({next_lowest}) have the lowest perplexities and cannot be told apart "
            f"(95 % interval of their ratio: {ratio.low:.3f} to {ratio.high:.3f})."
        )
    below = [100 * (1 - share) for share in (ratio.value, ratio.high, ratio.low)]
    return (
        f"{first} has the lowest perplexity, {lowest}, {below[0]:.1f} % below that of {second}, {next_lowest} "
        f"(95 % interval: {below[1]:.1f} to {below[2]:.1f} %)."
    )


def _lower_at_more_bits(first: Row, group: set[str], text: str, summary: list[Row]) -> str:
    """The lowest of the others with the same model, bits and grid, if it is lower still; it stores more or fewer bits."""
    alike = [row for row in summary if all(row[name] == first[name] for name in ("model", "bits", "grid"))]
    others = [row for row in alike if row["series"] not in group and row.get(ppl(text), 1e999) < first[ppl(text)]]
    if not others:
        return ""
    best = min(others, key=lambda row: row[ppl(text)])
    return f" {best['label']} reads {best[ppl(text)]:.2f} and stores {best[BITS_PER_WEIGHT]:.2f} bits per weight."


def _seeds(first: Row, second: Row) -> str:
    fewest = min(first["seeds"], second["seeds"])
    if fewest == 1:
        return "That is one calibration seed: the interval covers the text's windows, not other calibration data."
    return f"That is over {fewest} calibration seeds."
