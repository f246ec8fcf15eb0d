"""Which series beats which: paired intervals of the perplexity ratio within a block, and the rule for bold."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import pandas as pd

from analysis.bootstrap import Floats, Losses, Ratio, perplexity_ratio
from analysis.collect import collect_run, rows_of
from analysis.series import Row

TOLERANCE = 0.05  # bits per weight, as printed, by which rivals may differ
BOLD_NOTE = (
    "Bold: a lower perplexity than every rival, beyond the spread. Rivals have the same model, bits and grid, and bits per "
    f"weight within {TOLERANCE} of each other; beyond the spread means that the 95 % paired bootstrap interval of the "
    "ratio, over windows and (where there are several) seeds, lies below 1 against each rival. A tie is not bold, nor is "
    "a method without a rival."
)
LOWEST_NOTE = (
    "Perplexity over the lowest of the same model, bits and grid, with the 95 % paired bootstrap interval; one that holds 1 "
    "is a tie. Bits per weight differ: see them before you compare. Every pair of methods is in intervals.csv."
)

AllLosses = Mapping[tuple[str, str], Losses]  # of (series, text)


@dataclass(frozen=True)
class Pair:
    """Two series of one block (model, bits and grid) on one text: the perplexity of the first over the other's."""

    first: Row
    other: Row
    text: str
    ratio: Ratio

    @property
    def rivals(self) -> bool:
        """Whether their bits per weight are alike, so that one can win."""
        return round(abs(_printed(self.first) - _printed(self.other)), 2) <= TOLERANCE

    def turned(self) -> "Pair":
        """The same pair the other way round."""
        return Pair(self.other, self.first, self.text, self.ratio.inverse())


def losses(frame: pd.DataFrame) -> AllLosses:
    """The windows' losses of every series and text of the runs that are done."""
    rows = rows_of(frame.loc[frame["status"] == "done"], "windows.csv")
    found: dict[tuple[str, str], dict[int, Floats]] = defaultdict(dict)
    if not rows.empty:
        for keys, part in rows.groupby(["series", "text", "seed"]):
            series, text, seed = map(str, keys)  # pyright: ignore[reportArgumentType]
            found[series, text][int(seed)] = part.sort_values("window")["nll"].to_numpy(float)
    return {place: Losses(by_seed) for place, by_seed in found.items()}


def pairs(summary: list[Row], all_losses: AllLosses) -> list[Pair]:
    """Every two quantized series of a block on every text whose windows both have, each pair once."""
    blocks: dict[tuple[object, ...], list[Row]] = defaultdict(list)
    for row in summary:
        if row["bits"] is not None:
            blocks[row["model"], row["bits"], row["grid"]].append(row)
    found = []
    texts = sorted({text for _, text in all_losses})
    for first, other in (pair for members in blocks.values() for pair in combinations(members, 2)):
        for text in texts:
            one, two = all_losses.get((first["series"], text)), all_losses.get((other["series"], text))
            if one and two:
                found.append(Pair(first, other, text, perplexity_ratio(one, two)))
    return found


def winners(between: list[Pair]) -> set[tuple[str, str]]:
    """The (series, text) that are set in bold, of what `pairs` found; BOLD_NOTE is the rule in words."""
    beats: dict[tuple[str, str], bool] = {}
    for pair in both_ways(between):
        if pair.rivals:
            place = pair.first["series"], pair.text
            beats[place] = beats.get(place, True) and pair.ratio.high < 1
    return {place for place, all_of_them in beats.items() if all_of_them}


def both_ways(between: list[Pair]) -> list[Pair]:
    """Every pair, and turned round."""
    return [way for pair in between for way in (pair, pair.turned())]


def against_lowest(summary: list[Row], between: list[Pair]) -> pd.DataFrame:
    """For every series with others in its block: its perplexity over the block's lowest, a column a text, as words."""
    largest: dict[tuple[str, str], Ratio] = {}  # against the lowest, the ratio is the largest
    for pair in both_ways(between):
        place = pair.first["series"], pair.text
        largest[place] = max(largest.get(place, pair.ratio), pair.ratio, key=lambda ratio: ratio.value)
    texts = sorted({text for _, text in largest})
    rows = []
    for row in summary:
        ratios = {text: largest[row["series"], text] for text in texts if (row["series"], text) in largest}
        if ratios:
            named = {"model": row["model"], "bits": f"{row['bits']}", "grid": row["grid"], "method": row["label"]}
            words = {text: str(ratio) if ratio.value > 1 else "lowest" for text, ratio in ratios.items()}
            rows.append(named | {"bits per weight": f"{row['bits_per_weight']:.2f}"} | words)
    return pd.DataFrame(rows).fillna("")


def tabulate(between: list[Pair]) -> pd.DataFrame:
    """All pairs as numbers, a row each."""
    rows = [
        {name: pair.first[name] for name in ("model", "bits", "grid")}
        | {"text": pair.text, "rivals": pair.rivals}
        | {"method": pair.first["label"], "other_method": pair.other["label"]}
        | {"series": pair.first["series"], "other_series": pair.other["series"]}
        | asdict(pair.ratio)
        for pair in between
    ]
    return pd.DataFrame(rows).rename(columns={"value": "ratio"})


def compare(first: Path, second: Path) -> dict[str, Ratio]:
    """The perplexity of one run over that of another, text by text, with paired intervals over the windows.

    Raises:
        FileNotFoundError: a folder holds no run.
        ValueError: a run is not done, has no windows, or the two were not measured on the same windows of a text.
    """
    one, two = ({"folder": str(folder)} | collect_run(folder).iloc[0].to_dict() for folder in (first, second))
    for run in (one, two):
        if run["status"] != "done":
            raise ValueError(f"{run['folder']} has no perplexity: its status is {run['status']}")
    texts = [name.removeprefix("ppl/") for name in one if str(name).startswith("ppl/") and name in two]
    if not texts:
        raise ValueError(f"{first} and {second} have no text in common")
    for text in texts:
        for kind in ("protocol", "sha256", "windows"):
            values = [run.get(f"{kind}/{text}") for run in (one, two)]
            if values[0] != values[1]:
                raise ValueError(
                    f"{first} and {second} were not measured on the same windows of {text}: {kind}/{text} is "
                    f"{values[0]} in one and {values[1]} in the other. Run both on the same data"
                )
    return {text: perplexity_ratio(_of_run(first, text), _of_run(second, text)) for text in texts}


def _of_run(folder: Path, text: str) -> Losses:
    for (_, name), found in losses(collect_run(folder)).items():
        if name == text:
            return Losses({0: found.nll[0]})
    raise ValueError(f"{folder} has no windows.csv with {text}: run it again with force=true")


def _printed(row: Row) -> float:
    """Bits per weight as a table shows them."""
    return float(f"{row['bits_per_weight']:.2f}")
