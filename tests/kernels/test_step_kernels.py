"""Greedy sampling, copies of block tables and corrected counts by Triton kernels, beside vLLM's own."""

from __future__ import annotations

import json

import pytest

from tests.support.fresh import interpreted


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What is wrong, by what was tried."""
    file = tmp_path_factory.mktemp("step-kernels") / "results.json"
    interpreted("tests.kernels.step_kernels_by_triton", file)
    results: dict[str, list[str]] = json.loads(file.read_text())
    return results


@pytest.mark.parametrize("what", ["greedy", "used", "whole", "counts"])
def test_the_kernels_do_what_vllm_does(found: dict[str, list[str]], what: str) -> None:
    assert found[what] == []
