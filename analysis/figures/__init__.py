"""The figures of a study, each from the rows that its tables are made of.

Every figure is a function that returns a matplotlib figure, or raises `LeftOut` with a sentence that says why the study has
no such figure. `style` holds colors, markers, axes and files; `points` how a series is drawn.
"""
