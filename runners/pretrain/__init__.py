"""Train the bundled model on the text that every Python carries: `python -m runners.pretrain`.

The model has OPT's architecture, so it takes the code path of `opt-13b`. Training continues from its last checkpoint when
the same command is given again.
"""
