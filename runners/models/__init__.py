"""Checkpoints and decoders: found, verified, read block by block, and walked through."""
