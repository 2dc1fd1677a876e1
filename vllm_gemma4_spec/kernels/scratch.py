"""Memory that a kernel with sums of several blocks needs beside its result."""

from __future__ import annotations

import torch
from torch import Tensor


class Scratch:
    """Partial sums and arrival counters (zero), one pair per device; GEMMs of one stream share them."""

    def __init__(self) -> None:
        self._buffers: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._captured = False  # a CUDA graph uses them
        self._replaced: list[tuple[Tensor, Tensor]] = []  # by a larger engine's in this process, and still used

    def reserve(self, device: torch.device, floats: int, counters: int) -> None:
        """Grow to what a layer needs; before any CUDA graph of this engine is captured.

        Weights that are loaded again reserve again: what waking from sleep level 2 leaves here is as it must be then.
        """
        before = self._buffers.get(device)
        partial, arrivals = before or (None, None)
        if partial is None or partial.numel() < floats:
            partial = torch.empty(floats, dtype=torch.float32, device=device)
        if arrivals is None or arrivals.numel() < counters:
            arrivals = torch.empty(counters, dtype=torch.int32, device=device)
        arrivals.zero_()
        self._buffers[device] = (partial, arrivals)
        if self._captured and before and (partial is not before[0] or arrivals is not before[1]):
            self._replaced.append(before)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if not self._captured and device.type == "cuda":
            self._captured = torch.cuda.is_current_stream_capturing()
        return self._buffers[device]

    def floats(self, device: torch.device, count: int) -> Tensor | None:
        """The partial sums' memory, if there is that much of it."""
        partial, _ = self._buffers.get(device, (None, None))
        return partial if partial is not None and partial.numel() >= count else None


# Of kernels that run one after the other and write it behind their wait for the one before: the streaming GEMM's parts
# of tiles, attention's parts of contexts.
PARTS = Scratch()
