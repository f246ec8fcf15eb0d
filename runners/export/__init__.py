"""`python -m runners.export RUN format=FORMAT to=FOLDER`: the weights of a finished run as a checkpoint for other tools."""
