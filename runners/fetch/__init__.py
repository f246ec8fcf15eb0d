"""`python -m runners.fetch NAME`: real language models without a model hub."""
