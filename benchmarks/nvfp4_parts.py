"""The parts of ``nvfp4_linear.py``; each runs in a process of its own and writes its findings as JSON."""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch

from vllm_gemma4_spec.checkpoints import nvfp4

_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
}


def config(name: str, layers: int, algorithm: str, small: bool = False) -> dict[str, Any]:
    """31B or E4B in their own widths with ``layers`` layers and a vocabulary of 4096: the layers' cost undiluted."""
    shapes: dict[str, Any] = {"hidden_size": 5376, "intermediate_size": 21504, "num_attention_heads": 32}
    shapes |= {"num_key_value_heads": 16, "num_global_key_value_heads": 4, "attention_k_eq_v": True}
    shapes |= {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "head_dim": 256, "global_head_dim": 512}
    if name == "E4B":
        shapes |= {"hidden_size": 2560, "intermediate_size": 10240, "num_attention_heads": 8, "num_key_value_heads": 2}
        shapes |= {"num_global_key_value_heads": None, "attention_k_eq_v": False, "hidden_size_per_layer_input": 256}
        shapes |= {"num_kv_shared_layers": layers * 18 // 42}
    if small:
        shapes |= {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
        shapes |= {"num_global_key_value_heads": 1, "head_dim": 64, "global_head_dim": 128}
    return {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "dtype": "bfloat16",
        "num_hidden_layers": layers,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * (layers // 6),
        "sliding_window": 1024 if name == "31B" else 512,
        "max_position_embeddings": 8192,
        "rope_parameters": _ROPE,
        "final_logit_softcapping": 30.0,
        "vocab_size": 4096,
        "vocab_size_per_layer_input": 4096,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "eos_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "quantization_config": {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"]},
        **shapes,
    }


def decoder(folder: str, device: str, small: bool) -> None:
    """An engine with dummy weights, torch.compile and CUDA graphs on, that times decode steps when told to.

    Reads a batch size a line from stdin; answers microseconds a step, the median of five batches of replays of
    the graph that the engine captured and last used. Printed lines start with ``READY`` or ``TIME``.
    """
    replayed: list[Any] = []
    if device == "cuda":
        original = torch.cuda.CUDAGraph.replay

        def replay(graph: Any) -> None:
            replayed.append(graph)
            original(graph)

        torch.cuda.CUDAGraph.replay = replay  # type: ignore[method-assign]
    import vllm_gemma4_spec

    vllm_gemma4_spec.apply()
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": 512}
    options |= {"max_num_seqs": 4, "max_num_batched_tokens": 512, "seed": 0, "enforce_eager": small}
    if device == "cuda":
        options |= {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 1 << 30}
        options |= {"compilation_config": {"cudagraph_capture_sizes": [1, 4]}}
    llm = LLM(folder, dtype="bfloat16", **options)
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, detokenize=False)

    def step(batch: int) -> dict[str, float]:
        prompts = [{"prompt_token_ids": list(range(5, 69))}] * batch
        replayed.clear()
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        spent = (time.perf_counter() - start) / params.max_tokens * 1e6
        if not replayed:
            return {"us": spent, "graphs_per_step": 0.0}
        graph, batches = replayed[-1], []
        for _ in range(5):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for n in range(70):
                if n == 20:  # by now the queue is full, so launches take no time from the card
                    first.record()
                original(graph)
            last.record()
            last.synchronize()
            batches.append(first.elapsed_time(last) * 20)  # ms for 50 -> us each
        graphs = (len(replayed)) / (params.max_tokens - 1)
        return {"us": statistics.median(batches), "graphs_per_step": graphs, "wall_us": spent}

    for batch in (1, 4):
        step(batch)
    print("READY", flush=True)
    for line in sys.stdin:
        print("TIME " + json.dumps(step(int(line))), flush=True)


def shard_tensors(settings: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a checkpoint with this config, NaN block scales in each down_proj."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    with torch.device("meta"):
        model = Gemma4ForCausalLM(Gemma4TextConfig(**settings))
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        if not name.endswith("_proj.weight"):
            yield name, torch.ones(value.shape, dtype=torch.bfloat16)
            continue
        base, (rows, columns) = name.removesuffix("weight"), value.shape
        scale = torch.randint(60, 120, (rows, columns // 16), dtype=torch.uint8)
        if "down_proj" in name:
            scale[::97, 0] = 0x7F
        yield name, torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
        yield f"{base}weight_scale", scale.view(torch.float8_e4m3fn)
        yield f"{base}weight_scale_2", torch.tensor(1e-4)
        yield f"{base}input_scale", torch.tensor(0.01)
        if "o_proj" in name or "down_proj" in name:
            yield f"{base}pre_quant_scale", torch.ones(columns, dtype=torch.bfloat16)


def load(device: str, small: bool) -> dict[str, Any]:
    """Seconds to load six layers of 31B from a warm page cache, and seconds of that spent on the scales."""
    from safetensors.torch import save_file
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    from tests.support.engine import engine
    from vllm_gemma4_spec.quantization import linear

    spent = {"load": 0.0, "scan": 0.0, "narrow": 0.0, "headers": 0.0}

    def timing(what: str, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            if device == "cuda":
                torch.cuda.synchronize()
            spent[what] += time.perf_counter() - start
            return result

        return timed

    from vllm_gemma4_spec.checkpoints import files

    linear.repair = timing("scan", linear.repair)
    nvfp4.narrow_ = timing("narrow", nvfp4.narrow_)
    files.read_headers = timing("headers", files.read_headers)
    BaseModelLoader.load_model = timing("load", BaseModelLoader.load_model)
    settings = config("31B", 6, "NVFP4_AWQ", small)
    options: dict[str, Any] = {"num_gpu_blocks_override": 64, "max_model_len": 64, "max_num_batched_tokens": 64}
    if device == "cuda":
        options |= {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 30}
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(settings))
        save_file(dict(shard_tensors(settings)), Path(folder) / "model.safetensors")
        size = (Path(folder) / "model.safetensors").stat().st_size
        for _ in range(3):  # the first one loads kernels, too
            spent.update(dict.fromkeys(spent, 0.0))
            with engine(Path(folder), dtype="bfloat16", **options):
                pass
            runs.append({f"{what} %": 100 * seconds / spent["load"] for what, seconds in spent.items()} | spent)
    share = {what: statistics.median(r[f"{what} %"] for r in runs) for what in ("scan", "narrow", "headers")}
    percent = share["scan"]
    what = f"{percent:.2f} % of {runs[-1]['load']:.2f} s for {size / 1e9:.1f} GB (limit 2 %)"
    what += f"; range of the scales {share['narrow']:.2f} %, headers {share['headers']:.2f} %"
    return {"percent": percent, "bytes": size, "runs": runs, "ok": small or percent <= 2, "what": what}


PARTS = {"load": load}


if __name__ == "__main__":
    out, device, small, part, *more = sys.argv[1], sys.argv[2], sys.argv[3] == "small", *sys.argv[4:]
    if part == "decoder":
        decoder(out, device, small)
    else:
        Path(out).write_text(json.dumps(PARTS[part](device, small, *more), indent=1))
