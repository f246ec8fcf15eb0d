"""Files that are there whole or not at all, a cache under hashes, and fingerprints of what is on disk."""
