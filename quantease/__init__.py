"""Layer-wise post-training quantization: the problem, the grid and the QuantEase solver. Needs torch and nothing else."""
