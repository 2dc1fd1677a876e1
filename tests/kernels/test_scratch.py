"""Memory that GEMMs with sums of several blocks share."""

from __future__ import annotations

import torch

from vllm_gemma4_spec.kernels.scratch import Scratch

CPU = torch.device("cpu")


def test_it_grows_and_is_ready_again_whenever_weights_are_loaded() -> None:
    scratch = Scratch()
    scratch.reserve(CPU, 8, 4)
    partial, arrivals = scratch.on(CPU)
    assert not arrivals.any()
    arrivals.fill_(3)  # what waking from sleep level 2 may leave
    scratch.reserve(CPU, 2, 2)
    again = scratch.on(CPU)
    assert (again[0].data_ptr(), again[1].data_ptr()) == (partial.data_ptr(), arrivals.data_ptr())  # graphs hold these
    assert not arrivals.any()
    scratch.reserve(CPU, 16, 8)
    assert [t.numel() for t in scratch.on(CPU)] == [16, 8]
