"""Atomic files, locks, a cache of tensors, and fingerprints of files."""
