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
# How the parts of the package `analysis` work together, from run folders to a table in LaTeX. Put the name of your own study
# into the next cell.

# %%
from IPython.display import Markdown

from analysis import intervals
from analysis.collect import collect
from analysis.published import published_numbers
from analysis.series import summarize
from analysis.tables import papers
from analysis.tables.comparison import comparison, markdown
from analysis.tables.latex import latex
from runners.project import ROOT

study = ROOT / "results" / "tiny"

# %% [markdown]
# All runs as one data frame, one row per run.

# %%
frame = collect(study)
frame[["method", "bits", "group_size", "seed", "bits_per_weight", "ppl/stdlib_docs", "device"]].head()

# %% [markdown]
# The table of the runs at 3 bits, mean ± standard deviation over the seeds.

# %%
at_3_bits = collect(study, {"bits": "3"})
Markdown(markdown(comparison(at_3_bits)))

# %% [markdown]
# How sure is that? The ratio to the lowest perplexity of the same model, bits and grid, with paired bootstrap intervals.

# %%
summary = summarize(at_3_bits)
pairs = intervals.compare_peers(summary, intervals.window_losses(at_3_bits))
intervals.ratios_to_lowest(summary, pairs)

# %% [markdown]
# The table of one text in the form of the papers, one column per model, with published numbers beside ours where everything
# agrees; then the same in LaTeX.

# %%
metric = papers.table_metrics(summary)[0]
table = papers.paper_table(summary, metric, intervals.winners(pairs), published_numbers())
Markdown(papers.markdown(table))

# %%
print(latex(table))
