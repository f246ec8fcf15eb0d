"""Layouts of checkpoints that other tools have quantized: from the tensors in their files to floating-point weights."""
