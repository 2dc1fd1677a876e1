"""The drafter at the speed of the hardware: one CUDA graph per batch size, one slot kernel per pass."""
