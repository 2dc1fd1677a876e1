"""Memory that GEMMs with sums of several blocks share."""

from __future__ import annotations

import weakref

import pytest
import torch

from vllm_gemma4_spec.kernels.scratch import Scratch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


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


def test_what_a_graph_was_captured_with_outlives_a_larger_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two engines of one process: a replay of the first one's graph writes where it always did."""
    scratch = Scratch()
    scratch.reserve(CPU, 8, 4)
    replaced = weakref.ref(scratch.on(CPU)[0])
    scratch.reserve(CPU, 16, 4)
    assert replaced() is None, "nobody uses it before a graph does"
    used = [weakref.ref(tensor) for tensor in scratch.on(CPU)]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    scratch._buffers[CUDA] = scratch._buffers[CPU]
    scratch.on(CUDA)
    del scratch._buffers[CUDA]
    scratch.reserve(CPU, 16, 4)
    assert not scratch._replaced, "the same are used on"
    scratch.reserve(CPU, 32, 4)
    assert all(tensor() is not None for tensor in used)
    assert scratch.on(CPU)[0].numel() == 32
