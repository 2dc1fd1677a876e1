"""An all-reduce and what a Gemma 4 layer does with the sum, on two GPUs: microseconds in a CUDA graph, by kernel.

    python benchmarks/all_reduce.py --out all-reduce.json

``vllm`` is vLLM's custom all-reduce and torch.compile's kernel behind it (norm, residual, scalar, norm; with this
package's settings), ``fused`` the kernel of ``vllm_gemma4_spec/kernels/all_reduce_norm.cu``; ``sum`` is vLLM's
all-reduce alone. Where FlashInfer can be imported, ``flashinfer-sum`` has its all-reduce in the place of vLLM's,
``flashinfer-norm`` its all-reduce with a norm, as vLLM's fusion calls it, and a compiled kernel behind that. Each graph
holds a chain in which a result is the next residual. ``error`` is the largest difference from float32, in units of the
last place of the largest value in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CHAIN, EPS = 40, 1e-6
Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def flashinfer_forms(
    weights: list[Tensor], scale: Tensor, width: int, behind: Any, behind_norm: Any
) -> dict[str, Step]:
    try:
        import flashinfer.comm as comm
        from vllm.distributed.device_communicators.flashinfer_all_reduce import get_fi_ar_workspace
    except ImportError:
        return {}
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    workspace = get_fi_ar_workspace(
        world_size=2,
        rank=group.rank_in_group,
        max_token_num=1024,
        hidden_dim=width,
        dtype=torch.bfloat16,
        group=group.device_group,
    )
    if workspace is None:
        return {}
    first, second = weights
    patterns = comm.AllReduceFusionPattern

    def total(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        summed = comm.allreduce_fusion(
            input=x, workspace=workspace, pattern=patterns.kAllReduce, launch_with_pdl=True, use_oneshot=True
        )
        return behind(summed, first, residual, scale, second)

    def with_norm(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        normed, none = torch.empty_like(x), torch.zeros_like(x)
        comm.allreduce_fusion(
            input=x,
            workspace=workspace,
            pattern=patterns.kARResidualRMSNorm,
            launch_with_pdl=True,
            residual_out=torch.empty_like(x),
            norm_out=normed,
            residual_in=none,
            rms_gamma=first,
            rms_eps=EPS,
            use_oneshot=True,
            fp32_acc=True,
        )
        return behind_norm(normed, residual, scale, second)

    return {"flashinfer-sum": total, "flashinfer-norm": with_norm}


def measure(rank: int, store: str, rows: list[int], widths: list[int], out: Path) -> None:
    os.environ["VLLM_PLUGINS"] = ""
    torch.cuda.set_device(rank)
    torch._inductor.config.triton.enable_pdl = True
    torch._dynamo.config.recompile_limit = 64
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import get_tp_group, parallel_state
    from vllm.model_executor.layers.layernorm import RMSNorm

    from vllm_gemma4_spec.kernels import all_reduce_norm
    from vllm_gemma4_spec.performance.compile_settings import use_choices

    use_choices()

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return RMSNorm.forward_static(x, EPS, x.shape[-1], x.dtype, weight)  # type: ignore[return-value]

    @torch.compile(dynamic=False)
    def behind(
        summed: Tensor, weight: Tensor, residual: Tensor, scale: Tensor, following: Tensor
    ) -> tuple[Tensor, Tensor]:
        hidden = (norm(summed, weight) + residual) * scale
        return hidden, norm(hidden, following)

    @torch.compile(dynamic=False)
    def behind_norm(normed: Tensor, residual: Tensor, scale: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
        hidden = (normed + residual) * scale
        return hidden, norm(hidden, following)

    found: list[dict[str, Any]] = []
    with set_current_vllm_config(VllmConfig()), torch.no_grad():
        parallel_state.init_distributed_environment(2, rank, f"file://{store}", rank, "nccl")
        parallel_state.initialize_model_parallel(2)
        group = get_tp_group()
        for width in widths:
            weights = [(1 + 0.2 * torch.randn(width, device="cuda")).bfloat16() for _ in range(2)]
            scale = torch.full((1,), 0.75, device="cuda", dtype=torch.bfloat16)
            for tensor in weights:
                torch.distributed.broadcast(tensor, 0, group=group.device_group)
            memory = all_reduce_norm.exchange(group.unique_name, width)
            assert memory is not None, "the GPUs cannot read each other's memory"

            def summed_by_vllm(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
                return behind(group.all_reduce(x), weights[0], residual, scale, weights[1])  # noqa: B023

            def alone(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
                return residual, group.all_reduce(x)

            def fused(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
                return all_reduce_norm.launch(x, weights[0], residual, scale, weights[1], EPS, memory)  # noqa: B023

            forms: dict[str, Step] = {"vllm": summed_by_vllm, "sum": alone, "fused": fused}
            forms |= flashinfer_forms(weights, scale, width, behind, behind_norm)
            for count in rows:
                found.append(one_size(count, width, forms, weights, scale, group, rank))
                if rank == 0:
                    print(found[-1], flush=True)
                    out.write_text(json.dumps(found, indent=1))
    torch.distributed.barrier()
    os._exit(0)  # vLLM's and FlashInfer's own clean-up takes seconds


def one_size(
    rows: int, width: int, forms: dict[str, Step], weights: list[Tensor], scale: Tensor, group: Any, rank: int
) -> dict[str, Any]:
    from vllm.distributed.parallel_state import graph_capture

    from vllm_gemma4_spec.kernels import all_reduce_norm

    torch.manual_seed(rank)
    parts = [torch.randn(rows, width, device="cuda").bfloat16() for _ in range(CHAIN)]
    torch.manual_seed(7)
    residual = torch.randn(rows, width, device="cuda").bfloat16()
    result: dict[str, Any] = {"rows": rows, "width": width, "us": {}, "error": {}, "same_on_both": {}}
    for name, step in forms.items():
        hidden, normed = step(
            parts[0].clone(), residual.clone()
        )  # outside of the graph: what is compiled, and the check
        total = parts[0].clone()
        torch.distributed.all_reduce(total, group=group.device_group)
        if name != "sum":
            want = all_reduce_norm.reference(total, weights[0], residual, scale, weights[1], EPS)
            result["error"][name] = max(
                round(float((got.float() - w.float()).abs().max() / (w.float().abs().max() * 2**-8)), 2)
                for got, w in zip((hidden, normed), want, strict=True)
            )
            other = normed.clone()
            torch.distributed.broadcast(other, 0, group=group.device_group)
            equal = torch.tensor([int(torch.equal(other, normed))], device="cuda")
            torch.distributed.all_reduce(equal, torch.distributed.ReduceOp.MIN, group=group.device_group)
            result["same_on_both"][name] = bool(equal.item())
        graph = torch.cuda.CUDAGraph()
        with graph_capture(torch.device("cuda", rank)) as context, torch.cuda.stream(context.stream):
            for captured in (False, True):
                if captured:
                    graph.capture_begin()
                at = residual
                for x in parts:
                    at, last = step(x, at)
                if captured:
                    graph.capture_end()
        for _ in range(5):
            graph.replay()
        torch.cuda.synchronize()
        torch.distributed.barrier(group=group.cpu_group)
        times = []
        for _ in range(20):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1000 / CHAIN)
        result["us"][name] = round(sorted(times)[len(times) // 2], 2)
        if name == "fused":  # a chain of exchanges: every slot was used many times over
            result["chain"] = bool(torch.isfinite(last).all())
            vllm_last = result.pop("last")
            result["chain_difference"] = round(float((vllm_last - last.float()).abs().max()), 3)
        if name == "vllm":
            result["last"] = last.float()
    result.pop("last", None)
    return result


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--rows", default="1,4,16,64,256")
    ap.add_argument("--widths", default="5376,2560")
    ap.add_argument("--out", type=Path, default=Path("all-reduce.json"))
    args = ap.parse_args()
    rows, widths = ([int(n) for n in text.split(",")] for text in (args.rows, args.widths))
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(measure, (f"{folder}/store", rows, widths, args.out), nprocs=2)


if __name__ == "__main__":
    main()
