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
# # The figures of a study
#
# Every figure is a function of `analysis`, which gives a matplotlib figure or says why the study has none. Name your own
# study in the next cell.

# %%
from pathlib import Path

from IPython.display import Image, display

import analysis
from analysis.collect import collect, rows_of
from analysis.figures import layer_figures, model_figures
from analysis.figures.style import png
from analysis.series import summarize

study = Path(analysis.__file__).parents[1] / "results" / "tiny"
model = "tiny"

# %% [markdown]
# Perplexity against everything that is stored: what is on the gray line, nothing smaller reaches.

# %%
frame = collect(study)
summary = summarize(frame)
Image(png(model_figures.pareto(summary, model)))

# %% [markdown]
# Where in the model the error is, at 3 bits.

# %%
at_3_bits = collect(study, {"bits": "3"})
Image(png(layer_figures.layer_errors(summarize(at_3_bits), rows_of(at_3_bits, "layers.csv"), model)))

# %% [markdown]
# Figures that need more than the study has say so.

# %%
for draw in (model_figures.against_size, model_figures.zero_shot, model_figures.seconds):
    try:
        display(Image(png(draw(summary))))
    except model_figures.LeftOut as reason:
        print(f"{draw.__name__}: {reason}")
