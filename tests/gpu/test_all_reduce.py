"""The kernel in the place of an all-reduce and two norms, on two GPUs: its bits, in graphs too, and two starts."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import vllm_gemma4_spec
from tests.gpu import device
from tests.support import engine, tiny_models

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]  # on a CPU: tests/kernels/test_all_reduce_norm.py
WIDTHS, ROWS, EPS, REPLAYS = (5376, 2560, 256), (1, 3, 64, 256), 1e-6, 50


def compare(rank: int, store: str) -> None:
    """One rank: the kernel that exchanges rows, and vLLM's all-reduce with the same kernel behind it, bit for bit."""
    torch.cuda.set_device(rank)
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import get_tp_group, parallel_state

    from vllm_gemma4_spec.kernels import all_reduce_norm

    torch.manual_seed(0)  # the same weights and residuals on both
    with set_current_vllm_config(VllmConfig()), torch.inference_mode():
        parallel_state.init_distributed_environment(2, rank, f"file://{store}", rank, "nccl")
        parallel_state.initialize_model_parallel(2)
        group = get_tp_group()
        for width in WIDTHS:
            weight, following = ((1 + 0.2 * torch.randn(width, device="cuda")).bfloat16() for _ in range(2))
            scale = torch.tensor([0.75], device="cuda").bfloat16()
            memory = all_reduce_norm.exchange(group.unique_name, width)
            assert memory is not None
            for rows in ROWS:
                residual = torch.randn(rows, width, device="cuda").bfloat16()
                parts = torch.randn(2, rows, width, device="cuda").bfloat16()
                parts[..., 14:18] = -0.0  # the bits of a word that has not arrived
                mine = parts[rank].contiguous()
                total = group.all_reduce(mine)
                for factor, then in ((None, following), (scale, following), (None, None)):
                    made = all_reduce_norm.launch(mine, weight, residual, factor, then, EPS, memory)
                    same = all_reduce_norm.launch(total, weight, residual, factor, then, EPS, None)
                    wanted = all_reduce_norm.reference(total, weight, residual, factor, then, EPS)
                    for got, alike, near in zip(made, same, wanted, strict=True):
                        assert torch.equal(got, alike), (width, rows)
                        torch.testing.assert_close(got, near, atol=2e-2, rtol=1e-2)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    at = residual
                    for _ in range(7):
                        at, _normed = all_reduce_norm.launch(mine, weight, at, scale, following, EPS, memory)
                for _ in range(REPLAYS):
                    graph.replay()
                chain = residual
                for _ in range(7):
                    chain, _normed = all_reduce_norm.launch(total, weight, chain, scale, following, EPS, None)
                assert torch.equal(at, chain), (width, rows)
        torch.cuda.synchronize()
        torch.distributed.barrier(group=group.cpu_group)
    os._exit(0)


def test_the_bits_are_those_of_vllms_all_reduce(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(compare, (str(tmp_path / "store"),), nprocs=2)


def launched(worker: Any) -> list[int]:
    """In a worker: how many forms of the kernel were compiled, and rows of how many widths are exchanged."""
    from vllm_gemma4_spec.kernels import all_reduce_norm

    return [all_reduce_norm._kernels.cache_info().currsize, all_reduce_norm.exchange.cache_info().currsize]


def start(target: Path, drafter: Path) -> dict[str, Any]:
    """In a process of its own: start, answer, and say what was compiled and launched."""
    vllm_gemma4_spec.apply()
    options = device.options(mode=3, dtype="bfloat16", **device.ranks(2))
    with engine.engine(target, drafter, device.K, **options) as llm:
        found = device.ask(llm, engine.random_prompts(device.LENGTHS[:4]), 32)
        return {
            "launched": llm.collective_rpc(launched),
            "tokens": found.tokens,
            "accepted": found.accepted,
            "proposed": found.proposed,
        }


def test_an_engine_takes_it_on_a_first_and_a_second_start(tmp_path: Path, measured: Any) -> None:
    target = tiny_models.save(tiny_models.target_config(**device.HEADS), tmp_path / "target")
    first, second = device.two_starts("tests.gpu.test_all_reduce", target, target, tmp_path, 300)
    measured(**{f"{name} {turn}": run[name] for turn, run in (("first", first), ("second", second))
                for name in ("launched", "accepted", "proposed")})  # fmt: skip
    for run in (first, second):
        assert all(forms >= 2 and widths == 1 for forms, widths in run["launched"])
        assert run["accepted"] > 0.5 * run["proposed"] > 0  # by itself; in bfloat16 a GEMM's bits go by the batch
    assert second["tokens"] == first["tokens"]


if __name__ == "__main__":
    Path(sys.argv[3]).write_text(json.dumps(start(Path(sys.argv[1]), Path(sys.argv[2]))))
