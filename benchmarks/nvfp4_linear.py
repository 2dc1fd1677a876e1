"""NVFP4 linears on a GPU: right, and what pre_quant_scale costs. Stock vLLM 0.19.1 with CUDA and this package.

    python benchmarks/nvfp4_linear.py accuracy   # Marlin (or the backend vLLM picks) against a float32 reference
    python benchmarks/nvfp4_linear.py cost       # gate_up, gelu, multiply, down under torch.compile and a CUDA graph
    python benchmarks/nvfp4_linear.py experts    # experts in NVFP4 in the real engine against the same weights in bf16
    python benchmarks/nvfp4_linear.py decode     # whole decode steps of 31B with dummy weights, NVFP4 against NVFP4_AWQ
    python benchmarks/nvfp4_linear.py scan       # the search for NaN block scales against reading the weights

Each prints one JSON object; ``--device cpu --small`` runs the first two without a GPU, as a check of this file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from vllm_gemma4_spec.checkpoints import nvfp4

# (name, kind of layer, K, outputs) of 31B; K of o_proj differs between sliding and full layers
SHAPES = (
    ("qkv_proj", "merged", 5376, [8192, 4096, 4096]),
    ("o_proj sliding", "row", 8192, [5376]),
    ("o_proj full", "row", 16384, [5376]),
    ("gate_up_proj", "merged", 5376, [21504, 21504]),
    ("down_proj", "row", 21504, [5376]),
)
SMALL = (("gate_up_proj", "merged", 256, [512, 512]), ("down_proj", "row", 512, [256]))
TOKENS = (1, 4, 16, 64)


def world() -> Any:
    """One rank, and vLLM patched."""
    import vllm_gemma4_spec

    vllm_gemma4_spec.apply()
    import vllm.model_executor.layers.quantization.modelopt  # noqa: F401
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    context = set_current_vllm_config(VllmConfig())
    context.__enter__()
    store = f"file://{tempfile.mkdtemp()}/store"
    init_distributed_environment(1, 0, store, 0, "nccl" if torch.cuda.is_available() else "gloo")
    initialize_model_parallel(1, 1)
    return context


def tensors(rows: int, columns: int, seed: int, scaled: bool, rank: int) -> dict[str, torch.Tensor]:
    """Random NVFP4 tensors of one linear as ModelOpt writes them."""
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, device=DEVICE) * columns**-0.5
    scale_2 = torch.tensor(6 * columns**-0.5 / 2688, device=DEVICE)
    scale = nvfp4.block_scale(weight, scale_2)
    out = {"weight": nvfp4.encode(weight, scale, scale_2), "weight_scale": scale, "weight_scale_2": scale_2}
    out["input_scale"] = torch.tensor(0.01, device=DEVICE)
    shared = torch.Generator(device=DEVICE).manual_seed(99)
    if scaled:
        # rounded once, so that reference and layer read the same numbers
        out["pre_quant_scale"] = (torch.rand(columns, generator=shared, device=DEVICE) + 0.5).bfloat16()
    if rank:
        out["svdquant_lora_a"] = (
            torch.randn(rank, columns, generator=shared, device=DEVICE) * columns**-0.5
        ).bfloat16()
        out["svdquant_lora_b"] = (torch.randn(rows, rank, generator=generator, device=DEVICE) * 0.3).bfloat16()
    return out


def linear(
    name: str, kind: str, columns: int, outputs: list[int], scaled: bool = True, rank: int = 0
) -> tuple[Any, Any]:
    """A loaded vLLM layer in bf16, and its members' tensors."""
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
    from vllm.utils.torch_utils import set_default_torch_dtype

    from vllm_gemma4_spec.modelopt import Nvfp4Config

    algorithm = "NVFP4_SVD" if rank else "NVFP4_AWQ"
    config = Nvfp4Config.from_config({"quant_algo": algorithm, "quant_method": "modelopt", "ignore": []})
    with set_default_torch_dtype(torch.bfloat16), torch.device(DEVICE):
        if kind == "row":
            layer = RowParallelLinear(columns, outputs[0], bias=False, quant_config=config, prefix=name)
        else:
            layer = MergedColumnParallelLinear(columns, outputs, bias=False, quant_config=config, prefix=name)
    members = [tensors(rows, columns, seed, scaled, rank) for seed, rows in enumerate(outputs)]
    for index, parts in enumerate(members):
        for suffix, value in parts.items():
            param = getattr(layer, suffix)
            param.weight_loader(param, value, *([] if kind == "row" else [index]))
    layer.quant_method.process_weights_after_loading(layer)
    return layer, members


def reference(members: list[dict[str, torch.Tensor]], x: torch.Tensor, branch: bool = True) -> torch.Tensor:
    """float32: pre_quant_scale multiplies in the activation's dtype, the low-rank branch sees the product."""
    xs = x * members[0]["pre_quant_scale"] if "pre_quant_scale" in members[0] else x
    out = []
    for parts in members:
        y = xs.float() @ nvfp4.dequantize(parts["weight"], parts["weight_scale"], parts["weight_scale_2"]).T
        if branch and "svdquant_lora_a" in parts:
            y = y + xs.float() @ parts["svdquant_lora_a"].float().T @ parts["svdquant_lora_b"].float().T
        out.append(y)
    return torch.cat(out, -1)


def accuracy(shapes: Any) -> dict[str, Any]:
    """Relative error (Frobenius) of each layer, and of three mistakes that it must stay far below."""
    torch.backends.cuda.matmul.allow_tf32 = False
    rows = []
    for name, kind, columns, outputs in shapes:
        for rank in (0, 32):
            layer, members = linear(name, kind, columns, outputs, rank=rank)
            for tokens in TOKENS:
                generator = torch.Generator(device=DEVICE).manual_seed(tokens)
                x = torch.randn(tokens, columns, generator=generator, device=DEVICE).bfloat16()
                truth = reference(members, x)
                y = layer.quant_method.apply(layer, x).float()
                bare = [{k: v for k, v in parts.items() if k != "pre_quant_scale"} for parts in members]
                swapped = [{**parts, "weight": (parts["weight"] << 4) | (parts["weight"] >> 4)} for parts in members]
                wrong = {"no pre_quant_scale": reference(bare, x), "nibbles swapped": reference(swapped, x)}
                if rank:
                    wrong["no branch"] = reference(members, x, branch=False)
                relative = lambda z, t=truth: ((z - t).norm() / t.norm()).item()  # noqa: E731
                row = {"layer": name, "rank": rank, "tokens": tokens, "error": relative(y)}
                rows.append(row | {what: relative(z) for what, z in wrong.items()})
            backend = str(layer.quant_method.backend)
            del layer, members
    worst = max(row["error"] for row in rows)
    nearest = min(v for row in rows for k, v in row.items() if k not in ("layer", "rank", "tokens", "error"))
    return {"backend": backend, "worst_error": worst, "nearest_mistake": nearest, "rows": rows}


def timed(function: Any, repeat: int = 200) -> float:
    """Microseconds a call, median of seven batches; one CUDA graph replay a call on a GPU."""
    for _ in range(3):
        function()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        function = graph.replay
    batches = []
    for _ in range(7):
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeat):
            function()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        batches.append((time.perf_counter() - start) / repeat * 1e6)
    return statistics.median(batches)


def cost(shapes: Any) -> dict[str, Any]:
    """An MLP, where the product fuses into gelu * up, and a lone o_proj, where it is an operation of its own."""
    by_name = {shape[0]: shape for shape in shapes}
    gate_up, down = by_name["gate_up_proj"], by_name["down_proj"]
    out: dict[str, Any] = {}
    first, _ = linear(*gate_up, scaled=False)
    ways = {way: linear(*down, scaled=way == "with")[0] for way in ("with", "without")}

    def mlp(second: Any) -> Any:
        def forward(x: torch.Tensor) -> torch.Tensor:
            gate, up = first.quant_method.apply(first, x).chunk(2, -1)
            return second.quant_method.apply(second, torch.nn.functional.gelu(gate, approximate="tanh") * up)

        return torch.compile(forward, fullgraph=True, dynamic=False)

    for tokens in TOKENS:
        x = torch.randn(tokens, gate_up[2], device=DEVICE).bfloat16()
        compiled = {way: mlp(second) for way, second in ways.items()}
        times = {way: timed(lambda f=function, x=x: f(x)) for way, function in compiled.items()}
        out[f"mlp, {tokens} tokens"] = times | {"percent": 100 * (times["with"] / times["without"] - 1)}
        torch._dynamo.reset()
    name = next((n for n in by_name if n.startswith("o_proj")), "down_proj")
    lone = {way: linear(*by_name[name], scaled=way == "with")[0] for way in ("with", "without")}
    for tokens in TOKENS:
        x = torch.randn(tokens, by_name[name][2], device=DEVICE).bfloat16()
        times = {w: timed(lambda f=layer, x=x: f.quant_method.apply(f, x)) for w, layer in lone.items()}
        out[f"{name} alone, {tokens} tokens"] = times | {"percent": 100 * (times["with"] / times["without"] - 1)}
    return out


def _config(hidden: int, layers: int, algorithm: str, **more: Any) -> dict[str, Any]:
    pattern = ["sliding_attention"] * 5 + ["full_attention"]
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    full = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0}
    config = {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "layer_types": [*(pattern * layers)[: layers - 1], "full_attention"],
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "sliding_window": 1024,
        "max_position_embeddings": 8192,
        "rope_parameters": {"sliding_attention": rope, "full_attention": full},
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "eos_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": 2,
        **more,
    }
    if algorithm:
        config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"]}
    return config


_DECODE = """
import json, sys, time
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], load_format="dummy", skip_tokenizer_init=True, max_model_len=1024, max_num_seqs=4,
          gpu_memory_utilization=0.8, seed=0)
params = SamplingParams(max_tokens=120, temperature=0, ignore_eos=True, detokenize=False)
out = {}
for batch in (1, 4):
    prompts = [{"prompt_token_ids": list(range(5, 69))}] * batch
    llm.generate(prompts, params, use_tqdm=False)
    runs = []
    for _ in range(5):
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        runs.append(batch * 120 / (time.perf_counter() - start))
    out[batch] = sorted(runs)[2]
print("RESULT " + json.dumps(out))
"""


def decode(layers: int) -> dict[str, Any]:
    """Tokens a second of 31B with dummy weights, torch.compile and CUDA graphs on; each algorithm twice, in turn.

    Dummy NVFP4_AWQ weights carry pre_quant_scale where ModelOpt writes it: o_proj and down_proj.
    """
    more = {"intermediate_size": 21504, "num_attention_heads": 32, "num_key_value_heads": 16}
    more |= {"num_global_key_value_heads": 4, "head_dim": 256, "global_head_dim": 512, "vocab_size": 262144}
    runs: dict[str, list[dict[str, float]]] = {"NVFP4": [], "NVFP4_AWQ": []}
    with tempfile.TemporaryDirectory() as folder:
        for algorithm in runs:
            path = Path(folder, algorithm)
            path.mkdir()
            (path / "config.json").write_text(json.dumps(_config(5376, layers, algorithm, **more)))
        for algorithm in [*runs, *runs]:
            command = [sys.executable, "-c", _DECODE, str(Path(folder, algorithm))]
            done = subprocess.run(command, capture_output=True, text=True)
            line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
            if line is None:
                raise SystemExit(done.stderr[-2000:])
            runs[algorithm].append(json.loads(line.removeprefix("RESULT ")))
    best = {a: {b: max(r[b] for r in runs[a]) for b in ("1", "4")} for a in runs}
    percent = {b: 100 * (best["NVFP4"][b] / best["NVFP4_AWQ"][b] - 1) for b in ("1", "4")}
    return {"tokens_per_second": runs, "cost_percent": percent}


_LOGPROBS = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], skip_tokenizer_init=True, max_model_len=128, max_logprobs=-1, enforce_eager=True,
          gpu_memory_utilization=0.3)
params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1, detokenize=False)
(o,) = llm.generate([{"prompt_token_ids": list(range(5, 45))}], params, use_tqdm=False)
print("RESULT " + json.dumps([[row[t].logprob for t in range(len(row))] for row in o.prompt_logprobs[1:]]))
"""


def experts() -> dict[str, Any]:
    """26B-like: experts and linears in NVFP4 with pre_quant_scale, against the folded weights in bf16, both in vLLM."""
    from safetensors.torch import save_file
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    more = {"intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
    more |= {"num_global_key_value_heads": 1, "head_dim": 64, "global_head_dim": 128, "initializer_range": 0.06}
    more |= {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 256}
    config = _config(512, 4, "", **more, vocab_size_per_layer_input=512)
    torch.manual_seed(0)
    model = Gemma4ForCausalLM(Gemma4TextConfig(**config)).to(torch.bfloat16)
    state = {k: v.to(DEVICE) for k, v in model.state_dict().items() if k != "lm_head.weight"}
    packed: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}

    def quantize(base: str, weight: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
        scale = nvfp4.block_scale(weight, scale_2)
        packed[f"{base}.weight"], packed[f"{base}.weight_scale"] = nvfp4.encode(weight, scale, scale_2), scale
        packed[f"{base}.weight_scale_2"] = scale_2.clone()
        packed[f"{base}.input_scale"] = torch.tensor(0.01)
        return nvfp4.dequantize(packed[f"{base}.weight"], scale, scale_2)

    largest = torch.stack([v.abs().max() for k, v in state.items() if "_proj" in k]).max().float()
    scale_2 = 2 ** torch.ceil(torch.log2(largest / 2688))  # a power of two: the plain bf16 weights are exact
    for name, value in state.items():
        if ".experts." in name:
            root, _, projection = name.rpartition(".")
            made = []
            for e, weight in enumerate(value):
                halves = weight.chunk(2) if projection == "gate_up_proj" else (weight,)
                names = ("gate_proj", "up_proj") if projection == "gate_up_proj" else ("down_proj",)
                pairs = zip(names, halves, strict=True)
                made.append(torch.cat([quantize(f"{root}.{e}.{p}", w, scale_2) for p, w in pairs]))
            plain[name] = torch.stack(made).bfloat16()
        elif name.endswith("_proj.weight"):
            base = name.removesuffix(".weight")
            plain[name] = quantize(base, value, scale_2).bfloat16()
            if "o_proj" in name or "down_proj" in name:
                scale = torch.tensor([0.5, 2.0], device=DEVICE).repeat(value.shape[1] // 2).bfloat16()
                packed[f"{base}.pre_quant_scale"] = scale  # powers of two: folding them rounds nothing
                plain[name] = (plain[name] * scale).bfloat16()
        else:
            packed[name] = plain[name] = value
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        variants = {"NVFP4_AWQ": packed, "": plain}
        variants["NVFP4_AWQ without pre_quant_scale"] = {k: v for k, v in packed.items() if "pre_quant" not in k}
        for label, weights in variants.items():
            path = Path(folder, label.replace(" ", "-") or "plain")
            path.mkdir()
            save_file({k: v.contiguous().cpu() for k, v in weights.items()}, path / "model.safetensors")
            made_config = _config(512, 4, label.split(" ")[0], **more, vocab_size_per_layer_input=512)
            (path / "config.json").write_text(json.dumps(made_config))
            done = subprocess.run([sys.executable, "-c", _LOGPROBS, str(path)], capture_output=True, text=True)
            line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
            if line is None:
                raise SystemExit(done.stderr[-3000:])
            results[label] = torch.tensor(json.loads(line.removeprefix("RESULT ")))
    error = lambda label: (results[label] - results[""]).abs().mean().item()  # noqa: E731
    names = [n for n in results if n]
    return {"spread": results[""].std().item(), "mean_difference": {n: error(n) for n in names}}


def scan() -> dict[str, Any]:
    """Seconds to read a shard of 31B's size class and to look for NaN in its scales, on the CPU, page cache warm."""
    from safetensors.torch import load_file, save_file

    rows, columns, count = 5376, 21504, 8
    with tempfile.TemporaryDirectory() as folder:
        scale = torch.randint(1, 120, (rows, columns // 16), dtype=torch.uint8).view(torch.float8_e4m3fn)
        weight = torch.randint(0, 255, (rows, columns // 2), dtype=torch.uint8)
        file = Path(folder, "x.safetensors")
        save_file({f"{i}.{n}": t for i in range(count) for n, t in (("w", weight.clone()), ("s", scale.clone()))}, file)
        load_file(file)
        start = time.perf_counter()
        loaded = {name: tensor.clone() for name, tensor in load_file(file).items()}
        read = time.perf_counter() - start
        start = time.perf_counter()
        found = [nvfp4.has_nan(t) for name, t in loaded.items() if name.endswith("s")]
        spent = time.perf_counter() - start
    assert found == [False] * count
    return {"read_seconds": read, "scan_seconds": spent, "percent": 100 * spent / read}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("accuracy", "cost", "experts", "decode", "scan"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--layers", type=int, default=60, help="of 31B, for decode")
    options = parser.parse_args()
    DEVICE = options.device
    shapes = SMALL if options.small else SHAPES
    if options.what in ("accuracy", "cost"):
        entered = world()  # kept: the config is unset when it goes
    act = {"accuracy": lambda: accuracy(shapes), "cost": lambda: cost(shapes), "experts": experts}
    act |= {"decode": lambda: decode(options.layers), "scan": scan}
    print(json.dumps(act[options.what](), indent=1))
