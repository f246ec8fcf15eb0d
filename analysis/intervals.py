"""Which series beats which: paired intervals of the perplexity ratio within a block, and the rule for bold."""

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

import pandas as pd

from analysis.collect import collect_run, rows_of
from analysis.statistics import Floats, Losses, Ratio, perplexity_ratio

BLOCK = ["model", "bits", "grid"]  # series that agree in these are comparable, but for their bits per weight
TOLERANCE = 0.05  # bits per weight, as printed, by which rivals may differ
BOLD_NOTE = (
    "Bold: a lower perplexity than every rival, beyond the spread. Rivals have the same model, bits and grid, and bits per "
    f"weight within {TOLERANCE} of each other; beyond the spread means that the 95 % paired bootstrap interval of the "
    "ratio, over windows and (where there are several) seeds, lies below 1 against each rival. A tie is not bold, nor is "
    "a method without a rival."
)

AllLosses = Mapping[tuple[str, str], Losses]  # of (series, text)


def losses(frame: pd.DataFrame) -> AllLosses:
    """The windows' losses of every series and text of the runs that are done."""
    rows = rows_of(frame.loc[frame["status"] == "done"], "windows.csv")
    found: dict[tuple[str, str], dict[int, Floats]] = {}
    if not rows.empty:
        for (series, text, seed), part in rows.groupby(["series", "text", "seed"]):  # pyright: ignore[reportGeneralTypeIssues]
            found.setdefault((series, text), {})[int(seed)] = part.sort_values("window")["nll"].to_numpy(float)
    return found


def pairs(summary: pd.DataFrame, all_losses: AllLosses) -> pd.DataFrame:
    """Every two series of a block on every text that both have, a row each way round.

    Columns: model, bits, grid, text, series, method, other (its series), other_method, like_bits (whether they are
    rivals), ratio, low, high.
    """
    rows = []
    texts = sorted({text for _, text in all_losses})
    for block, members in summary.dropna(subset="bits").groupby(BLOCK, sort=False):
        labels = dict(zip(BLOCK, block, strict=True)) if isinstance(block, tuple) else {}
        for one, other in combinations(members.to_dict("records"), 2):
            like = round(abs(_printed(one) - _printed(other)), 2) <= TOLERANCE
            for text in texts:
                first, second = all_losses.get((one["series"], text)), all_losses.get((other["series"], text))
                if first and second:
                    ratio = perplexity_ratio(first, second)
                    back = Ratio(1 / ratio.value, 1 / ratio.high, 1 / ratio.low)
                    rows.append(labels | {"text": text} | _pair(one, other, like, ratio))
                    rows.append(labels | {"text": text} | _pair(other, one, like, back))
    columns = [*BLOCK, "text", "series", "method", "other", "other_method", "like_bits", "ratio", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def winners(between: pd.DataFrame) -> set[tuple[str, str]]:
    """The (series, text) that are set in bold, of what `pairs` found; BOLD_NOTE is the rule in words."""
    rivals = between.loc[between["like_bits"]]
    beaten = rivals.assign(beats=rivals["high"] < 1).groupby(["series", "text"])["beats"].all()
    return {(series, text) for (series, text), wins in beaten.items() if wins}  # pyright: ignore[reportGeneralTypeIssues]


def compare(first: Path, second: Path) -> dict[str, Ratio]:
    """The perplexity of one run over that of another, text by text, with paired intervals over the windows.

    Raises:
        ValueError: a run is not done, has no windows, or the two were not measured on the same windows of a text.
    """
    one, two = collect_run(first), collect_run(second)
    for run in (one, two):
        if set(run["status"]) != {"done"}:
            raise ValueError(f"{run['folder'].iloc[0]} has no perplexity: its status is {run['status'].iloc[0]}")
    texts = [name for name in one.columns if name.startswith("ppl/") and name in two.columns]
    if not texts:
        raise ValueError(f"{first} and {second} have no text in common")
    found = {}
    for text in (name.removeprefix("ppl/") for name in texts):
        for kind in ("protocol", "sha256", "windows"):
            values = [run.get(f"{kind}/{text}", pd.Series([None])).iloc[0] for run in (one, two)]
            if values[0] != values[1]:
                raise ValueError(
                    f"{first} and {second} were not measured on the same windows of {text}: {kind}/{text} is "
                    f"{values[0]} in one and {values[1]} in the other. Run both on the same data"
                )
        found[text] = perplexity_ratio(*(_of_run(run, text) for run in (one, two)))
    return found


def _of_run(run: pd.DataFrame, text: str) -> Losses:
    by_seed = losses(run).get((run["series"].iloc[0], text))
    if not by_seed:
        raise ValueError(f"{run['folder'].iloc[0]} has no windows.csv with {text}: run it again with force=true")
    return {0: next(iter(by_seed.values()))}


def _printed(row: Mapping[object, object]) -> float:
    """Bits per weight as a table shows them."""
    return float(f"{row['bits_per_weight']:.2f}")


def _pair(one: Mapping, other: Mapping, like: bool, ratio: Ratio) -> dict[str, object]:
    names = {"series": one["series"], "method": one["label"], "other": other["series"], "other_method": other["label"]}
    return names | {"like_bits": like, "ratio": ratio.value, "low": ratio.low, "high": ratio.high}
