# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Which layers does the loss come from?
#
# `python -m runners.audit RUN to=results/STUDY/audit/NAME.csv` quantizes one layer of a run at a time, leaves all others in
# full precision, and measures the KL divergence from the unquantized model. This notebook reads every such file of a folder:
# the one that the environment variable `AUDIT_FOLDER` names, else `results/smollm2/audit`, else the first
# `results/STUDY/audit` that there is. All numbers in the text below are computed from these files.

# %%
from typing import Any

import pandas as pd
from IPython.display import Image, Markdown, display

from analysis.audit import compared, default_folder, error_correlations, read_audits, single_layers, whole_and_sum
from analysis.figures.audit_figures import against_base
from analysis.figures.points import LeftOut
from analysis.figures.style import png


def show(table: Any) -> None:
    """A table as Markdown, with four digits."""
    display(Markdown(table.to_markdown(index=False, floatfmt=".4g")))


folder = default_folder()
frame = read_audits(folder)
layers = single_layers(frame)
base, *others = frame["run"].unique()
where = frame.iloc[0]
Markdown(
    f"`{folder.parent.name}/{folder.name}`: the runs {', '.join([base, *others])} on {where['windows']} windows of "
    f"{where['length']} tokens of {where['text']}, {layers.groupby('run').size().max()} layers each."
)

# %% [markdown]
# ## Do the layers' damages add up?
#
# Where the sum of the layers' KL alone is near the KL of the whole model, each layer can be looked at by itself. A quotient
# above 1 says that errors cancel or saturate, one below 1 that they make each other worse. `layers restored` is the sum of
# what the whole model's KL loses when one layer at a time gets its weights back.

# %%
sums = whole_and_sum(frame)
quotients = sums["sum / whole"]
show(sums)
Markdown(
    f"The sum of the layers is {quotients.min():.2f} to {quotients.max():.2f} times the KL of the whole model: "
    + (
        "they add up, within a quarter."
        if min(quotients) > 0.75 and max(quotients) < 1.25
        else "they do not simply add up."
    )
)

# %% [markdown]
# ## Where does a layer alone cost most?

# %%
for name, run in layers.groupby("run", sort=False):
    worst = run.nlargest(5, "kl")
    first = worst.iloc[0]
    display(
        Markdown(
            f"**{name}**: {worst['kl'].sum() / run['kl'].sum():.0%} of the sum is in five of {len(run)} layers; most in "
            f"{first['layer']} of block {first['block']} (KL {first['kl']:.2g}, perplexity {first['ppl']:.2f})."
        )
    )
    shown = ["block", "layer", "kl", "kl_p99", "ppl", "share_top_percent", "kl_first_positions", "kl_rest"]
    show(worst[shown])

# %% [markdown]
# ## Which layers are worse than with rounding to nearest?
#
# Every point is a layer. Above the diagonal it costs more than in the run of the x axis.

# %%
try:
    display(Image(png(against_base(frame, base))))
except LeftOut as reason:
    print(reason)

# %%
for other in others:
    pairs = compared(frame, base, other)
    worse = pairs[pairs["difference"] > 0]
    net, lost = sum(pairs["difference"]), sum(worse["difference"])
    said = f"**{other}** costs more than {base} in {len(worse) or 'none'} of {len(pairs)} layers"
    said += f", by {lost:.4f} together" if len(worse) else ""
    said += f"; over all layers its sum is {'higher' if net > 0 else 'lower'} by {abs(net):.4f}."
    if len(worse):
        row = worse.iloc[0]
        said += (
            f" Most of that, {row['difference'] / lost:.0%}, is {row['layer']} of block {row['block']}: "
            f"{row[f'kl {other}']:.4f} instead of {row[f'kl {base}']:.4f}."
        )
    display(Markdown(said))
    if len(worse):
        columns = ["block", "layer", f"kl {base}", f"kl {other}", f"kl_first_positions {other}", f"kl_rest {other}"]
        energies = [name for name in ("energy_top_percent", "energy_position") if name in worse]
        show(worse.head(5)[columns + energies])

# %% [markdown]
# ## What do the token energies say of these layers?
#
# `energy_top_percent` is the share of the energy of a layer's input that 1 % of the calibration tokens have. Where it is
# near 1, the solver protects these few tokens, and the others pay.

# %%
for other in others:
    pairs = compared(frame, base, other)
    if "energy_top_percent" not in pairs or not len(pairs["energy_top_percent"].dropna()):
        display(Markdown(f"**{other}**: its run has not measured token energies."))
        continue
    ruled = pairs["energy_top_percent"] > 0.5
    parts = {"ruled by few tokens (more than half of the energy in 1 %)": pairs[ruled], "all others": pairs[~ruled]}
    for words, part in parts.items():
        if part.empty:
            display(Markdown(f"**{other}**, no layer, {words}."))
            continue
        worse = (part["difference"] > 0).sum()
        mean = part[["energy_top_percent", f"kl_first_positions {other}", f"kl_first_positions {base}"]].mean()
        share, first, first_base = mean
        said = f"**{other}**, {len(part)} layers, {words}: {worse} are worse than with {base}; on average 1 % of the tokens "
        said += f"has {share:.0%} of the energy. The sum of their KL is {part[f'kl {other}'].sum():.4f}, with {base} "
        said += f"{part[f'kl {base}'].sum():.4f}; at positions 0 to 3 the mean is {first:.2g}, with {base} {first_base:.2g}."
        display(Markdown(said))

# %% [markdown]
# ## Do layer errors predict what a layer costs?
#
# Spearman's correlation over the layers of a run. `in its kind` is the mean over kinds of layers (all `fc1`, all `fc2`) of
# the correlation among layers that differ in their block alone.

# %%
found = error_correlations(frame)
show(found)
ranked = found.drop(columns="run").mean()
Markdown(
    f"On average over the runs the {ranked.idxmax()} orders the layers best ({ranked.max():.2f}), and the {ranked.idxmin()} "
    f"worst ({ranked.min():.2f})."
    if len(ranked)
    else "The runs have not measured layer errors."
)

# %% [markdown]
# ## One token
#
# `python -m runners.audit.first_token` quantizes one layer of the unquantized model and looks at its output at the first
# position of the window. `token error` is the mean of ||(W - W_hat) x||^2 / ||W x||^2 over held-out tokens at that position,
# and at all others; `kl first restored` is the KL with the layer's output at that position alone as it was.

# %%
first = folder.parent / "audit_first_token.csv"
if first.is_file():
    tokens = pd.read_csv(first)
    columns = ["output_first", "output_rest", "token_error_first", "token_error_rest", "kl", "kl_first_restored"]
    show(tokens[["block", "layer", "method", *columns]])
    worst = tokens.loc[tokens["kl"].idxmax()]
    said = f"{worst['method']} costs most in {worst['layer']} of block {worst['block']}: KL {worst['kl']:.3f}. Its error at "
    said += f"the first position is {worst['token_error_first']:.1f} times the output there, at the others "
    said += f"{worst['token_error_rest']:.3f} times. With that one output restored it is "
    said += f"{worst['kl_first_restored']:.4f}: {1 - worst['kl_first_restored'] / worst['kl']:.0%} of the damage comes from "
    said += "one token of the window."
    display(Markdown(said))
else:
    display(Markdown(f"`{first.name}` is not there: `python -m runners.audit.first_token --help`."))
