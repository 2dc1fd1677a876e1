"""The kernel for few queries gives the attention of its requests, each with the bits that it has alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.fresh import interpreted


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    file: Path = tmp_path_factory.mktemp("few-queries") / "results.pt"
    interpreted("tests.kernels.few_queries_by_triton", file)
    found: list[dict[str, torch.Tensor]] = torch.load(file)
    return found


def test_attention_is_right(results: list[dict[str, torch.Tensor]]) -> None:
    for case in results:
        torch.testing.assert_close(case["got"], case["wanted"], rtol=1e-4, atol=1e-5)


def test_a_request_has_the_same_bits_alone(results: list[dict[str, torch.Tensor]]) -> None:
    for case in results:
        assert torch.equal(case["got"], case["alone"])


def test_a_cache_in_fp8_counts_with_its_scales(results: list[dict[str, torch.Tensor]]) -> None:
    scaled = [case for case in results if "scaled" in case]
    assert len(scaled) == 2
    for case in scaled:
        torch.testing.assert_close(case["scaled"], case["scaled wanted"], rtol=1e-4, atol=1e-5)


def test_requests_found_by_their_place_are_those_found_by_search(results: list[dict[str, torch.Tensor]]) -> None:
    searched = [case for case in results if "searched" in case]
    assert len(searched) == 3
    for case in searched:
        torch.testing.assert_close(case["searched"], case["wanted"], rtol=1e-4, atol=1e-5)
