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
# # The tables of a study
#
# Everything is in the package `analysis`; this shows how its pieces go together. Name your own study in the next cell.

# %%
from pathlib import Path

from IPython.display import Markdown

import analysis
from analysis import intervals
from analysis.collect import collect
from analysis.published import published
from analysis.series import summarize
from analysis.tables import papers
from analysis.tables.comparison import comparison, markdown
from analysis.tables.latex import latex

study = Path(analysis.__file__).parents[1] / "results" / "tiny"

# %% [markdown]
# All runs as one frame, a row a run.

# %%
frame = collect(study)
frame[["method", "bits", "group_size", "seed", "bits_per_weight", "ppl/stdlib_docs", "device"]].head()

# %% [markdown]
# The table of the runs at 3 bits, mean ± standard deviation over the seeds.

# %%
at_3_bits = collect(study, {"bits": "3"})
Markdown(markdown(comparison(at_3_bits)))

# %% [markdown]
# How sure is that? The ratio to the lowest perplexity of the same bits and grid, with paired bootstrap intervals.

# %%
summary = summarize(at_3_bits)
between = intervals.pairs(summary, intervals.losses(at_3_bits))
intervals.against_lowest(summary, between)

# %% [markdown]
# The table of one text as papers have it, a column a model, beside what others published where it is the same cell; and
# in LaTeX.

# %%
metric = papers.metrics(summary)[0]
table = papers.paper(summary, metric, intervals.winners(between), published())
Markdown(papers.markdown(table))

# %%
print(latex(table))
