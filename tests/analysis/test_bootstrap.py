"""Intervals of perplexity ratios: known cases, coverage by simulation, pairing, and the rule for bold."""

import math
from pathlib import Path

import numpy as np
import pytest

from analysis.bootstrap import Losses, perplexity_ratio
from analysis.collect import collect
from analysis.intervals import compare_peers, compare_runs, window_losses, winners
from analysis.series import summarize
from tests.conftest import PROJECT
from tests.studies import write_run

RNG = np.random.default_rng


def noisy(seeds: int, windows: int, shift: float, generator: np.random.Generator) -> tuple[Losses, Losses]:
    """Two series on windows of different difficulty; they differ by `shift`, and by noise per seed, per window and both."""
    hard = generator.normal(3, 1, windows)
    by_seed = generator.normal(0, 0.01 * (seeds > 1), (seeds, 1))  # one seed alone does not show its effect
    by_window = generator.normal(0, 0.03, windows)
    first = hard + shift + by_seed + by_window + generator.normal(0, 0.01, (seeds, windows))
    return Losses(dict(enumerate(first))), Losses(dict(enumerate(np.tile(hard, (seeds, 1)))))


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_series_ties_with_itself(seeds: int) -> None:
    first, _ = noisy(seeds, 20, 0.1, RNG(0))
    ratio = perplexity_ratio(first, Losses(dict(enumerate(first.nll))))
    assert (ratio.value, ratio.low, ratio.high) == (1, 1, 1)


def test_a_constant_difference_is_certain() -> None:
    nll = RNG(0).normal(3, 1, 50)
    ratio = perplexity_ratio(Losses({0: nll + math.log(1.1)}), Losses({0: nll}))
    assert ratio.value == pytest.approx(1.1)
    assert (ratio.low, ratio.high) == pytest.approx((1.1, 1.1))


def test_with_one_seed_the_interval_is_the_normal_one_of_the_mean_difference() -> None:
    generator = RNG(1)
    difference = generator.normal(-0.05, 0.1, 400)
    nll = generator.normal(3, 1, 400)
    ratio = perplexity_ratio(Losses({0: nll + difference}), Losses({0: nll}))
    half = 1.96 * difference.std() / 20
    assert math.log(ratio.low) == pytest.approx(difference.mean() - half, abs=0.1 * half)
    assert math.log(ratio.high) == pytest.approx(difference.mean() + half, abs=0.1 * half)


def test_with_noise_of_three_seeds_alone_the_interval_is_near_students() -> None:
    nll = np.full(30, 3.0)
    first = Losses({seed: nll + shift for seed, shift in enumerate((-0.01, 0.0, 0.01))})
    ratio = perplexity_ratio(first, Losses({0: nll}))
    assert math.log(ratio.high) == pytest.approx(
        4.303 * 0.01 / math.sqrt(3), rel=0.15
    )  # t of 2 degrees, times s / sqrt(n)


def test_pairing_windows_and_seeds_narrows_the_interval() -> None:
    first, second = noisy(3, 60, 0.0, RNG(2))
    shuffled = Losses(dict(enumerate(first.nll[:, RNG(3).permutation(60)])))
    paired, unpaired = perplexity_ratio(first, second), perplexity_ratio(shuffled, second)
    assert paired.value == pytest.approx(unpaired.value)
    assert math.log(paired.high / paired.low) < 0.3 * math.log(unpaired.high / unpaired.low)
    both = RNG(4).normal(0, 0.1, (3, 1))  # a good calibration set is good for both
    one, two = (Losses(dict(enumerate(losses.nll + both))) for losses in (first, second))
    apart = Losses(dict(zip((7, 8, 9), two.nll, strict=True)))
    assert perplexity_ratio(one, two).high < perplexity_ratio(one, apart).high


@pytest.mark.parametrize(("seeds", "least", "most"), [(1, 0.90, 0.99), (3, 0.92, 1.0)])
def test_intervals_contain_the_truth_as_often_as_they_claim(seeds: int, least: float, most: float) -> None:
    generator = RNG(5)
    hits = 0
    for _ in range(200):
        ratio = perplexity_ratio(*noisy(seeds, 64, -0.05, generator))
        hits += ratio.low <= math.exp(-0.05) <= ratio.high
    assert least <= hits / 200 <= most


def test_losses_that_cannot_be_paired_are_refused() -> None:
    with pytest.raises(ValueError, match="5 and of 6 windows"):
        perplexity_ratio(Losses({0: np.ones(5)}), Losses({0: np.ones(6)}))
    with pytest.raises(ValueError, match=r"the same windows, not \[5, 6\]"):
        Losses({0: np.ones(5), 1: np.ones(6)})


def put_series(study: Path, method: str, loss: float, stored: float = 3.0, seeds: int = 1, noise: float = 0.0) -> None:
    hard = RNG(0).normal(3, 1, 50)
    for seed in range(seeds):
        nll = hard + loss + noise * (seed - (seeds - 1) / 2)
        more = {"bits_per_weight": stored, "ppl/a": float(np.exp(nll.mean())), "protocol/a": "gptq", "sha256/a": "1"}
        labels = {"status": "done", "model": "m", "method": method, "bits": 3, "seed": seed, "series": method}
        write_run(study, f"{method}-{seed}", {"a": list(nll)}, **labels, **more, **{"windows/a": 50})


def bold(study: Path) -> set[str]:
    frame = collect(study)
    return {series for series, _ in winners(compare_peers(summarize(frame), window_losses(frame)))}


def test_bold_is_only_what_beats_every_rival_beyond_the_spread(tmp_path: Path) -> None:
    put_series(tmp_path, "rtn", 0.5)
    assert bold(tmp_path) == set()  # nobody to beat
    put_series(tmp_path, "gptq", 0.2)
    assert bold(tmp_path) == {"gptq"}
    put_series(tmp_path, "quantease_outlier", 0.1, stored=3.4)  # more bits: not a rival, and without rivals itself
    assert bold(tmp_path) == {"gptq"}
    put_series(tmp_path, "quantease", 0.19, stored=3.05, seeds=3, noise=0.02)  # better, but within its spread
    assert bold(tmp_path) == set()


def test_bold_needs_the_spread_over_seeds_too(tmp_path: Path) -> None:
    put_series(tmp_path, "gptq", 0.2, seeds=3)
    put_series(tmp_path, "quantease", 0.15, seeds=3, noise=0.001)
    assert bold(tmp_path) == {"quantease"}


def test_two_runs_are_compared_on_the_same_windows_only(tmp_path: Path) -> None:
    for method, loss in {"gptq": 0.2, "rtn": 0.3}.items():
        put_series(tmp_path, method, loss)
    first, second = tmp_path / "m" / "rtn-0", tmp_path / "m" / "gptq-0"
    assert compare_runs(first, second)["a"].value == pytest.approx(math.exp(0.1))
    text = (first / "metrics.json").read_text()
    for key, old, new in (("sha256", '"sha256/a": "1"', '"sha256/a": "2"'), ("protocol", '"gptq"', '"gptq-new"')):
        (first / "metrics.json").write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=f"not measured on the same windows of a: {key}/a is"):
            compare_runs(first, second)
    failed = '"failed", "stage": "evaluate", "error": "OSError: the disk is full"'
    (first / "metrics.json").write_text(text.replace('"done"', failed))
    with pytest.raises(ValueError, match="has no perplexity: its status is failed"):
        compare_runs(first, second)


def test_the_windows_of_the_committed_study_give_its_perplexities() -> None:
    frame = collect(PROJECT / "results" / "tiny", {"method": "gptq"})
    rows = {row["series"]: row for row in summarize(frame)}
    for (series, text), found in window_losses(frame).items():
        per_seed = np.exp(found.nll.mean(axis=1))
        assert per_seed.mean() == pytest.approx(rows[series][f"ppl/{text}"], rel=1e-6)
