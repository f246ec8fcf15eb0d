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
# Every figure is a function in `analysis.figures`, which returns a matplotlib figure or says why the study has none. Put
# the name of your own study and model into the next cell.

# %%
from IPython.display import Image, display

from analysis.collect import collect, read_tables
from analysis.figures import size_figures
from analysis.figures.layer_choice import layer_choices
from analysis.figures.layer_figures import layer_errors
from analysis.figures.pareto import pareto
from analysis.figures.points import LeftOut
from analysis.figures.style import png
from analysis.series import summarize
from runners.project import ROOT

study = ROOT / "results" / "tiny"
model = "tiny"

# %% [markdown]
# Perplexity against everything that is stored. The gray line is the Pareto front: a method on it has a lower perplexity than
# every method with as few bits per weight.

# %%
frame = collect(study)
summary = summarize(frame)
Image(png(pareto(summary, model)))

# %% [markdown]
# The error of every linear layer at 3 bits, over that which GPTQ leaves in it: one figure per grid.

# %%
at_3_bits = collect(study, {"bits": "3"})
layers = read_tables(at_3_bits, "layers.csv")
for choice in layer_choices(summarize(at_3_bits), layers, model):
    display(Image(png(layer_errors(choice, layers))))

# %% [markdown]
# Other figures need several sizes of a model; a study without them is told so.

# %%
for draw in (size_figures.against_size, size_figures.zero_shot, size_figures.seconds):
    try:
        display(Image(png(draw(summary))))
    except LeftOut as reason:
        print(f"{draw.__name__}: {reason}")
