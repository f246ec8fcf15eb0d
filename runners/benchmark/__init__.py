"""`python -m runners.benchmark`: how fast the solvers are, as ratios against stated alternatives in one run."""
