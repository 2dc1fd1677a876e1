"""Two ranks on the CPU gather columns: ``python -m tests.performance.gather_by_ranks FOLDER``.

The folder has an E4B's config. A stand-in says yes to shapes as vLLM's custom all-reduce does, which needs GPUs, and
adds with Gloo. Each rank prints "equal" at its end.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from typing import Any

import torch
from torch import Tensor
from vllm import platforms
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import get_tp_group, init_distributed_environment, initialize_model_parallel
from vllm.distributed.device_communicators.custom_all_reduce import CustomAllreduce
from vllm.model_executor.models.gemma4 import Gemma4ForCausalLM

import vllm_gemma4_spec
from tests.support.configs import on_two_ranks
from vllm_gemma4_spec.kernels import gather_columns
from vllm_gemma4_spec.performance import per_layer_gather

RANKS = 2
LARGEST = 2**20  # bytes of the stand-in


class Custom:
    """What the operator asks of ``CustomAllreduce``, whose own answer this one's is."""

    should_custom_ar = CustomAllreduce.should_custom_ar

    def __init__(self) -> None:
        self.disabled, self.world_size, self.fully_connected, self.max_size = False, RANKS, True, LARGEST
        self.calls = 0

    def custom_all_reduce(self, x: Tensor) -> Tensor:
        assert self.should_custom_ar(x)
        self.calls += 1
        total = x.clone()
        torch.distributed.all_reduce(total, group=get_tp_group().device_group)
        return total


def same_bits(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype == torch.bfloat16 and torch.equal(x.view(torch.int16), y.view(torch.int16))


def operator(custom: Custom) -> None:
    group, width = get_tp_group(), 5376
    gather_columns.register_operator()
    for rows in (1, 5, 80):
        x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows * RANKS + group.rank_in_group))
        x[:, ::7], x[:, 1::7], x[:, 2], x[:, 3] = -0.0, 0.0, torch.inf, 1e-40
        x = x.bfloat16()
        for disabled in (False, True):
            custom.disabled, before = disabled, custom.calls
            found = torch.ops.vllm.gemma4_spec_gather_columns(x, group.unique_name)
            assert same_bits(found, group.all_gather(x)), rows
            assert custom.calls - before == (not disabled and rows * width * RANKS * 2 < LARGEST)
    custom.disabled = False


def projection(folder: str, **own: Any) -> Any:
    """An E4B's, with this rank's weights."""
    config = on_two_ranks(folder, **own)
    torch.set_default_dtype(torch.bfloat16)
    with set_current_vllm_config(config):
        model = Gemma4ForCausalLM(vllm_config=config)
    torch.set_default_dtype(torch.float32)
    model.model.per_layer_model_projection.cpu_linear = torch.nn.functional.linear  # set once weights are loaded
    torch.manual_seed(get_tp_group().rank_in_group)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.model


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["VLLM_DIST_IDENT"] = str(rank)  # not one for both, which then would not ask Gloo
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(RANKS, rank, f"file://{folder}/store", rank, "gloo")
        initialize_model_parallel(RANKS)
    custom = Custom()
    get_tp_group().device_communicator.ca_comm = custom
    operator(custom)

    stock, ours = projection(folder, disable_custom_all_reduce=True), projection(folder)
    assert [m.per_layer_model_projection.gather_output for m in (stock, ours)] == [True, False]
    weights = stock.state_dict()
    assert {name: w.shape for name, w in weights.items()} == {name: w.shape for name, w in ours.state_dict().items()}
    ours.load_state_dict(weights)
    compiled = torch.compile(ours.project_per_layer_inputs, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for rows in (1, 5, 80):
            generator = torch.Generator().manual_seed(rows)  # both ranks have the same inputs
            hidden = torch.randn(rows, stock.config.hidden_size, generator=generator).bfloat16()
            layers = stock.config.num_hidden_layers, stock.hidden_size_per_layer_input
            ple = torch.randn(rows, *layers, generator=generator).bfloat16()
            want, before = stock.project_per_layer_inputs(hidden, ple), custom.calls
            assert same_bits(ours.project_per_layer_inputs(hidden, ple), want), rows
            assert same_bits(compiled(hidden, ple), want), rows
            assert custom.calls == before + 2
    print("equal", flush=True)


def main(folder: str) -> None:
    vllm_gemma4_spec.apply()
    per_layer_gather._on_cuda = lambda: True
    type(platforms.current_platform).use_custom_allreduce = lambda *_: True
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run, args=(rank, folder)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))


if __name__ == "__main__":
    main(sys.argv[1])
