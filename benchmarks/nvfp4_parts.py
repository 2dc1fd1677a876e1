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
Tensors = dict[str, torch.Tensor]


def world(device: str) -> Any:
    """One rank, and vLLM patched. The context must be kept: the config is unset when it goes."""
    import vllm_gemma4_spec

    vllm_gemma4_spec.apply()
    import vllm.model_executor.layers.quantization.modelopt  # noqa: F401
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    if device == "cuda":
        torch.cuda.set_device(0)
        torch.backends.cuda.matmul.allow_tf32 = False
    context = set_current_vllm_config(VllmConfig())
    context.__enter__()
    store = f"file://{tempfile.mkdtemp()}/store"
    init_distributed_environment(1, 0, store, 0, "nccl" if device == "cuda" else "gloo")
    initialize_model_parallel(1, 1)
    return context


def packed(weight: torch.Tensor, scale_2: torch.Tensor) -> Tensors:
    """``weight`` [N, K] in NVFP4 under the names of ModelOpt's export."""
    scale = nvfp4.block_scale(weight, scale_2)
    out = {"weight": nvfp4.encode(weight, scale, scale_2), "weight_scale": scale, "weight_scale_2": scale_2}
    return out | {"input_scale": torch.tensor(0.01, device=weight.device)}


def tensors(rows: int, columns: int, seed: int, device: str, rank: int) -> Tensors:
    """Random tensors of one linear: NaN scales of all three sorts, and scales as far apart as the format allows.

    The three: codes intact, codes intact under a negative NaN, codes destroyed.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, device=device) * columns**-0.5
    out = packed(weight, torch.tensor(6 * columns**-0.5 / 2688, device=device))
    codes = out["weight_scale"].view(torch.uint8)
    codes[0, 1], codes[7, 3], codes[9, 0] = 0x7F, 0xFF, 0x7F
    out["weight"][9, :8] = 0x77
    codes[1, :], codes[2, 0], codes[3, :] = 0x7E, 0x01, 0x00  # 448, 2 ** -9, 0
    shared = torch.Generator(device=device).manual_seed(99)
    # rounded once, so that reference and layer read the same numbers
    out["pre_quant_scale"] = (torch.rand(columns, generator=shared, device=device) + 0.5).bfloat16()
    if rank:
        a = torch.randn(rank, columns, generator=shared, device=device) * columns**-0.5
        b = torch.randn(rows, rank, generator=generator, device=device) * 0.3
        out |= {"svdquant_lora_a": a.bfloat16(), "svdquant_lora_b": b.bfloat16()}
    return out


def make_linear(name: str, kind: str, columns: int, outputs: list[int], members: list[Tensors], device: str) -> Any:
    """vLLM's layer in bf16 with ``members`` loaded through its weight loaders."""
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
    from vllm.utils.torch_utils import set_default_torch_dtype

    from vllm_gemma4_spec.quantization import Nvfp4Config

    algorithm = "NVFP4_SVD" if "svdquant_lora_a" in members[0] else "NVFP4_AWQ"
    config = Nvfp4Config.from_config({"quant_algo": algorithm, "quant_method": "modelopt", "ignore": []})
    with set_default_torch_dtype(torch.bfloat16), torch.device(device):
        if kind == "row":
            layer = RowParallelLinear(columns, outputs[0], bias=False, quant_config=config, prefix=name)
        else:
            layer = MergedColumnParallelLinear(columns, outputs, bias=False, quant_config=config, prefix=name)
    for index, parts in enumerate(members):
        for suffix, value in parts.items():
            param = getattr(layer, suffix)
            param.weight_loader(param, value.clone(), *([] if kind == "row" else [index]))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def weights(members: list[Tensors], *, swapped: bool = False, mended: bool = True) -> torch.Tensor:
    """float32 [sum of N, K], ``E2M1 * scale * scale_2``; NaN scales by the rule, or all 448."""
    out = []
    for parts in members:
        code, scale = parts["weight"], parts["weight_scale"].clone()
        found = nvfp4.find_nan(code, scale)
        if mended:
            nvfp4.mend_(scale, found)
        else:
            scale.view(torch.uint8)[tuple(found.index.T)] = 0x7E
        code = (code << 4) | (code >> 4) if swapped else code
        out.append(nvfp4.dequantize(code, scale, parts["weight_scale_2"]))
    return torch.cat(out)


def relative(y: torch.Tensor, truth: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the truth."""
    return float((y.float() - truth).norm() / truth.norm())


def linears(device: str, small: bool) -> dict[str, Any]:
    """Linears of 31B: the error of each, and of the mistakes that it must stay far below."""
    kept = world(device)
    rows = []
    backend, stock = "", {}
    for name, kind, columns, outputs in SMALL if small else SHAPES:
        for rank in (0, 32):
            members = [tensors(n, columns, seed, device, rank) for seed, n in enumerate(outputs)]
            layer = make_linear(f"layers.0.{name.split()[0]}", kind, columns, outputs, members, device)
            backend = str(layer.quant_method.backend)
            right, swapped = weights(members).T, weights(members, swapped=True).T
            unmended = weights(members, mended=False).T
            scale = members[0]["pre_quant_scale"]
            for tokens in TOKENS:
                generator = torch.Generator(device=device).manual_seed(tokens)
                x = torch.randn(tokens, columns, generator=generator, device=device).bfloat16()
                y = layer.quant_method.apply(layer, x)
                xs = (x * scale).float()  # in the activation's dtype, as every backend must
                branch = torch.zeros((), device=device)
                if rank:
                    parts = [xs @ p["svdquant_lora_a"].float().T @ p["svdquant_lora_b"].float().T for p in members]
                    branch = torch.cat(parts, -1)
                truth = xs @ right + branch
                wrong = {"no pre_quant_scale": x.float() @ right + branch, "nibbles swapped": xs @ swapped + branch}
                wrong["pre_quant_scale divides"] = (x.float() / scale.float()) @ right + branch
                if rank:
                    wrong["branch dropped"] = xs @ right
                row = {"layer": name, "rank": rank, "tokens": tokens, "error": relative(y, truth)}
                row["scale in the product"] = layer.rows_scaled
                row["mistakes"] = {what: relative(z, truth) for what, z in wrong.items()}
                # The mended blocks are few, so the rows that hold them are looked at alone.
                few = [0, 1, 2, 7, 9]
                row["error in rows with NaN or far scales"] = relative(y[:, few], truth[:, few])
                row["mistakes in these rows"] = {"destroyed at 448": relative((xs @ unmended)[:, few], truth[:, few])}
                rows.append(row)
            del layer, swapped, unmended
            if name == "down_proj" and not rank:
                stock = far_scales_in_stock(name, kind, columns, outputs, members, right.T, device)
            del members, right
    del kept
    keys = ("error", "error in rows with NaN or far scales")
    worst = max(row[key] for row in rows for key in keys)
    nearest = min(v for row in rows for key in ("mistakes", "mistakes in these rows") for v in row[key].values())
    return {
        "backend": backend,
        "worst_error": worst,
        "nearest_mistake": nearest,
        "ok": worst < 0.02 and nearest > 5 * worst,
        "what": f"largest relative error {worst:.4f} (limit 0.02), nearest mistake {nearest:.3f} (5 times that)",
        "far_scales_without_narrowing": stock,
        "rows": rows,
    }


def far_scales_in_stock(
    name: str, kind: str, columns: int, outputs: list[int], members: list[Tensors], right: torch.Tensor, device: str
) -> dict[str, float]:
    """Relative error of the row that has scales of 448 in a tensor that has one of 2 ** -9, as vLLM alone stores them.

    Not judged: it shows what ``nvfp4.narrow_`` is for.
    """
    x = torch.randn(16, columns, generator=torch.Generator(device=device).manual_seed(0), device=device).bfloat16()
    truth = (x * members[0]["pre_quant_scale"]).float() @ right.T
    out = {}
    narrow = nvfp4.narrow_
    for what, function in (("vLLM alone", lambda *_: None), ("with narrow_", narrow)):
        nvfp4.narrow_ = function
        layer = make_linear(f"{name} {what}", kind, columns, outputs, members, device)
        out[what] = relative(layer.quant_method.apply(layer, x)[:, 1:2], truth[:, 1:2])
    nvfp4.narrow_ = narrow
    return out


def experts(device: str, small: bool) -> dict[str, Any]:
    """A layer of 26B-A4B's experts, as later ModelOpt versions export them, with NaN block scales."""
    count, top, hidden, inner = (8, 2, 256, 64) if small else (128, 8, 2816, 704)
    kept = world(device)
    from vllm.model_executor.layers.fused_moe import FusedMoE
    from vllm.utils.torch_utils import set_default_torch_dtype

    from vllm_gemma4_spec.quantization import Nvfp4Config

    if device == "cuda":
        from vllm.v1.worker.workspace import init_workspace_manager

        init_workspace_manager(torch.device(device, 0))
    config = Nvfp4Config.from_config({"quant_algo": "NVFP4", "quant_method": "modelopt", "ignore": []})
    routed: dict[str, torch.Tensor] = {}
    with set_default_torch_dtype(torch.bfloat16), torch.device(device):
        layer = FusedMoE(
            count,
            top,
            hidden,
            inner,
            quant_config=config,
            prefix="layers.0.moe.experts",
            custom_routing_function=lambda *_, **__: (routed["weights"], routed["ids"]),
            activation="gelu",
        )
    truth: dict[str, list[torch.Tensor]] = {"w1": [], "w2": [], "w3": []}
    swapped: dict[str, list[torch.Tensor]] = {"w1": [], "w2": [], "w3": []}
    generator = torch.Generator(device=device).manual_seed(0)
    for expert in range(count):
        scale_2 = torch.tensor(6 * hidden**-0.5 / 2688 * (1 + expert / count), device=device)
        for shard, (rows, columns) in {"w1": (inner, hidden), "w3": (inner, hidden), "w2": (hidden, inner)}.items():
            weight = torch.randn(rows, columns, generator=generator, device=device) * columns**-0.5
            parts = packed(weight, scale_2 if shard != "w2" else torch.tensor(6 * columns**-0.5 / 2688, device=device))
            codes = parts["weight_scale"].view(torch.uint8)
            codes[0, 1], codes[7, 3], codes[9, 0], codes[2, 0] = 0x7F, 0xFF, 0x7F, 0x01
            parts["weight"][9, :8] = 0x77
            truth[shard].append(weights([parts]))
            swapped[shard].append(weights([parts], swapped=True))
            for suffix, value in parts.items():
                name = f"{'w2' if shard == 'w2' else 'w13'}_{suffix}"
                param = getattr(layer, name)
                param.weight_loader(param, value.clone(), f"experts.{name}", shard_id=shard, expert_id=expert)
    layer.quant_method.process_weights_after_loading(layer)
    found = {k: list(v) for k, v in layer.modelopt_nan.items()}

    def reference(w: dict[str, list[torch.Tensor]], x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(x.shape, device=device)
        for token, (ids, scales) in enumerate(zip(routed["ids"].tolist(), routed["weights"], strict=True)):
            for expert, scale in zip(ids, scales, strict=True):
                one = x[token].float()
                gate = torch.nn.functional.gelu(w["w1"][expert] @ one, approximate="tanh")
                out[token] += scale * (w["w2"][expert] @ (gate * (w["w3"][expert] @ one)))
        return out

    rows = []
    for tokens in TOKENS:
        x = torch.randn(tokens, hidden, generator=generator, device=device).bfloat16()
        logits = torch.randn(tokens, count, generator=generator, device=device)
        chosen = torch.topk(logits.softmax(-1), top)
        routed["weights"] = chosen.values / chosen.values.sum(-1, keepdim=True)
        routed["ids"] = chosen.indices.int()
        with torch.inference_mode():
            if layer.quant_method.is_monolithic:
                y = layer.quant_method.apply_monolithic(layer, x, logits)
            else:
                y = layer.quant_method.apply(layer, x, routed["weights"], routed["ids"], None)
        right = reference(truth, x)
        row = {"tokens": tokens, "error": relative(y, right)}
        rows.append(row | {"nibbles swapped": relative(reference(swapped, x), right)})
    del kept
    worst, nearest = max(r["error"] for r in rows), min(r["nibbles swapped"] for r in rows)
    backend = getattr(layer.quant_method, "nvfp4_backend", "emulation")
    return {
        "backend": str(backend),
        "nan_blocks": found,
        "ok": worst < 0.03 and nearest > 5 * worst and sum(n for n, _ in found.values()) == 9 * count,
        "what": f"largest relative error {worst:.4f} (limit 0.03), nibbles swapped {nearest:.3f}; NaN blocks {found}",
        "rows": rows,
    }


def checkpoints(device: str, small: bool, dtype: str = "bfloat16") -> dict[str, Any]:
    """Whole models that ModelOpt 0.42.0 exported, in the real engine, against the float32 reference.

    bf16 is how they are served; float16 has eight times less rounding, so it shows more.
    """
    from tests.checkpoints import reference
    from tests.quantization import comparison as c

    root = c.FIXTURES if device == "cpu" else c.WIDE_FIXTURES
    names = sorted(p.name for p in root.iterdir())[: 2 if small else None]
    options: dict[str, Any] = {"gpu_memory_utilization": 0.03, "kv_cache_memory_bytes": 1 << 28}
    options = options if device == "cuda" else {}
    out: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as made:
        folders = {name: root / name for name in names}
        for name in [n for n in names if "26b" in n]:  # experts in NVFP4, one NaN block
            folders[f"{name}, experts too"] = c.edited(root / name, Path(made, name), c.per_expert)
        for name, folder in folders.items():
            truth = reference.logprobs(folder, c.TOKENS)
            row: dict[str, Any] = {"mistakes": {}}
            for mistake, edit in c.mistakes(folder).items():
                wrong = c.edited(folder, Path(made, f"wrong {len(list(Path(made).iterdir()))}"), edit)
                row["mistakes"][mistake] = float((reference.logprobs(wrong, c.TOKENS) - truth).abs().mean())
            layers: dict[str, float] = {}
            try:
                ours = c.engine_logprobs(folder, layers, dtype=dtype, **options, **c.text_only(folder))
                difference = (ours - truth).abs()
                row |= {"mean": float(difference.mean()), "max": float(difference.max())}
                row |= {"linears": len(layers), "worst_linear": max(layers.values())}
            except Exception as error:  # one checkpoint must not lose the others
                row["failed"] = f"{type(error).__name__}: {error}"[:500]
            out[name] = row
            print(name, json.dumps(row), flush=True)
    limit = {"bfloat16": 0.02, "float16": 0.004}[dtype]  # of a linear's largest output; a mistake makes 0.2 and more
    right = {n: r for n, r in out.items() if "failed" not in r and r["worst_linear"] < limit}
    bad = [n for n, r in out.items() if n not in right or min(r["mistakes"].values()) < 5 * r["mean"]]
    worst = max((r["mean"] for r in right.values()), default=float("nan"))
    linear = max((r["worst_linear"] for r in right.values()), default=float("nan"))
    nearest = min(v for row in out.values() for v in row["mistakes"].values())
    what = f"{len(out)} models in {dtype}, mean difference of log-probabilities at most {worst:.4f}, nearest mistake"
    what += f" {nearest:.3f}; linears within {linear:.4f}" + (f"; NOT right: {bad}" if bad else "")
    return {"ok": bool(out) and not bad, "what": what, "models": out}


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

    linear.mend = timing("scan", linear.mend)
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


PARTS = {"linears": linears, "experts": experts, "checkpoints": checkpoints, "load": load}


if __name__ == "__main__":
    out, device, small, part, *more = sys.argv[1], sys.argv[2], sys.argv[3] == "small", *sys.argv[4:]
    if part == "decoder":
        decoder(out, device, small)
    else:
        Path(out).write_text(json.dumps(PARTS[part](device, small, *more), indent=1))
