"""Kernels that a drafter's short passes need, and the choice between them and vLLM's own."""
