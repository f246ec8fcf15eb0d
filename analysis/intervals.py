"""Which series has the lower perplexity: paired intervals of ratios between peers, and the rule for bold.

*Peers* are the quantized series of one model, number of bits and grid. *Rivals* are peers that also store about the same
number of bits per weight, so that one can win over the other. The first are compared in the table of ratios, the second
decide about bold.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import pandas as pd

from analysis.bootstrap import Floats, Losses, Ratio, perplexity_ratio
from analysis.collect import collect_run, read_tables
from analysis.series import Row
from runners.results import metrics
from runners.results.metrics import BITS_PER_WEIGHT, Status, bits_text

# Bits per weight by which rivals may differ. At the papers' sizes the column scales of AWQ (16 bits a column, 0.02 a weight
# in OPT-125M) and the 16-bit zero points of a per-channel refit stay within it; 1 % of outliers (0.3) does not.
TOLERANCE = 0.05
BOLD_NOTE = (
    "Bold: a lower perplexity than every rival, beyond the spread. Rivals have the same model, bits and grid, and bits per "
    f"weight within {TOLERANCE} of each other. Beyond the spread means that the 95 % paired bootstrap interval of the "
    "ratio, over windows and (where there are several) seeds, is below 1 against each rival. A tie is not bold, nor is "
    "a method without a rival."
)
LOWEST_NOTE = (
    "Perplexity over the lowest of the same model, bits and grid, with its 95 % paired bootstrap interval; an interval "
    "that contains 1 is a tie. Bits per weight differ: look at them before you compare. Every pair of methods is in "
    "intervals.csv."
)

SeriesText = tuple[str, str]  # a series and a text that it was measured on


@dataclass(frozen=True)
class Pair:
    """Two peers on one text, and the perplexity of the first over the other's."""

    first: Row
    other: Row
    text: str
    ratio: Ratio

    @property
    def rivals(self) -> bool:
        """Whether their bits per weight are alike, so that one can win."""
        # Judged by the two decimals that tables print, so that readers can check it; the difference of two such numbers
        # is rounded again, because 3.12 - 3.07 is 0.05 and a bit in binary.
        return round(abs(_printed_bits(self.first) - _printed_bits(self.other)), 2) <= TOLERANCE

    def swapped(self) -> "Pair":
        """The same pair, the other one first."""
        return Pair(self.other, self.first, self.text, self.ratio.inverse())


def window_losses(frame: pd.DataFrame) -> Mapping[SeriesText, Losses]:
    """The losses on every window of every series and text, of the runs that are done."""
    rows = read_tables(frame.loc[frame["status"] == Status.DONE], "windows.csv")
    found: dict[SeriesText, dict[int, Floats]] = defaultdict(dict)
    if not rows.empty:
        for keys, part in rows.groupby(["series", "text", "seed"]):
            series, text, seed = map(str, keys)  # pyright: ignore[reportArgumentType]
            found[series, text][int(seed)] = part.sort_values("window")["nll"].to_numpy(float)
    return {place: Losses(by_seed) for place, by_seed in found.items()}


def compare_peers(summary: list[Row], losses: Mapping[SeriesText, Losses]) -> list[Pair]:
    """Every two peers on every text whose windows both have measured, each pair once."""
    peers: dict[tuple[object, ...], list[Row]] = defaultdict(list)
    for row in summary:
        if row["bits"] is not None:
            peers[row["model"], row["bits"], row["grid"]].append(row)
    found = []
    texts = sorted({text for _, text in losses})
    for first, other in (pair for members in peers.values() for pair in combinations(members, 2)):
        for text in texts:
            one, two = losses.get((first["series"], text)), losses.get((other["series"], text))
            if one and two:
                found.append(Pair(first, other, text, perplexity_ratio(one, two)))
    return found


def winners(pairs: list[Pair]) -> set[SeriesText]:
    """The series and texts that are printed bold; BOLD_NOTE is the rule in words.

    A winner must beat all its rivals, because the runner-up alone is whichever had better luck. The intervals need no
    correction for the number of rivals: all of them must lie below 1 at once, which is stricter than any one of them
    (an intersection-union test).
    """
    beats_all: dict[SeriesText, bool] = {}
    for pair in _both_ways(pairs):
        if pair.rivals:
            place = pair.first["series"], pair.text
            beats_all[place] = beats_all.get(place, True) and pair.ratio.high < 1
    return {place for place, wins in beats_all.items() if wins}


def ratios_to_lowest(summary: list[Row], pairs: list[Pair]) -> pd.DataFrame:
    """For every series that has peers: its perplexity over the lowest among them, in words, one column per text."""
    # The ratio to the peer with the lowest perplexity is the largest of a series' ratios. The lowest itself has none
    # above 1.
    largest: dict[SeriesText, Ratio] = {}
    for pair in _both_ways(pairs):
        place = pair.first["series"], pair.text
        largest[place] = max(largest.get(place, pair.ratio), pair.ratio, key=lambda ratio: ratio.value)
    texts = sorted({text for _, text in largest})
    rows = []
    for row in summary:
        ratios = {text: largest[row["series"], text] for text in texts if (row["series"], text) in largest}
        if ratios:
            named = {"model": row["model"], "bits": bits_text(row["bits"]), "grid": row["grid"], "method": row["label"]}
            words = {text: str(ratio) if ratio.value > 1 else "lowest" for text, ratio in ratios.items()}
            rows.append(named | {"bits per weight": f"{row[BITS_PER_WEIGHT]:.2f}"} | words)
    return pd.DataFrame(rows).fillna("")


def pairs_table(pairs: list[Pair]) -> pd.DataFrame:
    """All pairs as numbers, one row per pair and text."""
    rows = [
        {name: pair.first[name] for name in ("model", "bits", "grid")}
        | {"text": pair.text, "rivals": pair.rivals}
        | {"method": pair.first["label"], "other_method": pair.other["label"]}
        | {"series": pair.first["series"], "other_series": pair.other["series"]}
        | asdict(pair.ratio)
        for pair in pairs
    ]
    return pd.DataFrame(rows).rename(columns={"value": "ratio"})


def compare_runs(first: Path, second: Path) -> dict[str, Ratio]:
    """The perplexity of one run over that of another on every text they share, with paired intervals over the windows.

    Raises:
        FileNotFoundError: a folder holds no run.
        ValueError: a run is not done or has no windows, or the two were not measured on the same windows of a text.
    """
    one, two = (_done_run(folder) for folder in (first, second))
    texts = [text for text in metrics.names(one, "ppl") if metrics.ppl(text) in two]
    if not texts:
        raise ValueError(f"{first} and {second} have no text in common")
    for text in texts:
        for key in (metrics.protocol(text), metrics.sha256(text), metrics.windows(text)):
            if one.get(key) != two.get(key):
                raise ValueError(
                    f"{first} and {second} were not measured on the same windows of {text}: {key} is "
                    f"{one.get(key)} in one and {two.get(key)} in the other. Run both on the same data"
                )
    return {text: perplexity_ratio(_losses_of_run(first, text), _losses_of_run(second, text)) for text in texts}


def _done_run(folder: Path) -> Row:
    run = collect_run(folder).iloc[0].to_dict()
    if run["status"] != Status.DONE:
        raise ValueError(f"{folder} has no perplexity: its status is {run['status']}")
    return run


def _losses_of_run(folder: Path, text: str) -> Losses:
    for (_, name), found in window_losses(collect_run(folder)).items():
        if name == text:
            # Seed 0 whatever the run's own: two single runs say nothing about seeds, and are paired over windows alone.
            return Losses({0: found.nll[0]})
    raise ValueError(f"{folder} has no windows.csv with {text}: run it again with force=true")


def _both_ways(pairs: list[Pair]) -> list[Pair]:
    return [way for pair in pairs for way in (pair, pair.swapped())]


def _printed_bits(row: Row) -> float:
    """Bits per weight as a table shows them."""
    return float(f"{row[BITS_PER_WEIGHT]:.2f}")
