"""Speculation on the CPU: the model runner's missing parts and PyTorch forms of the Triton kernels."""
