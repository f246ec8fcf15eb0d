"""The layer-wise harness: input statistics of each block, one solver a layer, finished blocks on disk."""
