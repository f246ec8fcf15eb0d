"""Train the bundled model on the documentation and source of Python's standard library: `python -m runners.pretrain`.

The model has OPT's architecture, so it exercises the code that `opt-13b` does. The same command continues an interrupted
training from its last checkpoint.
"""
