"""Layer-wise post-training quantization: the problem, the grid and the QuantEase solvers.

Needs torch; numba on a CPU and Triton on a GPU compile the pass over a block.
"""
