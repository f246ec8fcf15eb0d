"""Mirrors of a run in W&B or trackio. The results on disk stay the source of truth."""
