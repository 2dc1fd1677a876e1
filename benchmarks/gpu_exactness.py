"""Exactness on a GPU in float32: graph drafts, async scheduling and padding change no token.

    TRITON_F32_DEFAULT=ieee python benchmarks/gpu_exactness.py [--head-dim 256]
    python benchmarks/gpu_exactness.py --kv-cache-dtype fp8 --out fp8.json

Tiny models with head_dim 256 / 512. Per way of running: the answers equal plain decoding; a model that
drafts for itself has every draft accepted (``self-sleep``: before and after sleeping at level 1); and in every
step that a graph serves, the original ``propose`` runs on the same inputs and must give the same tokens. Exits 1
if anything differs.

A draft pass and a verification have different shapes, for which torch.compile and cuBLAS add in different orders. So
where the two best tokens of an answer are nearer than float32's own error (``near_ties``, counted in plain decoding),
a model may reject its own draft, and what follows it in that step.

With an fp8 KV cache a last-bit difference between two batch shapes can round a key to the next fp8 value, and
0.19.1 rounds queries and attention weights to fp8, too. So that run sets VLLM_BATCH_INVARIANT=1, under which a
token's numbers do not depend on what else is in the batch. It then compares what is left of an answer when a
checkpoint brings its own ``k_scale`` and ``v_scale`` (``scales`` below).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from vllm_gemma4_spec.registry import PATCHER

os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # tf32 would round differently in passes of different shape
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_GEMMA4_SPEC_CHECK", "0")  # tests/support turns it on, and then nothing is captured
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

K, TOKENS = 3, 48
TIE = 1e-4  # difference of two log-probabilities; float32 logits of these models are 2e-4 off those of float64
MEMORY = {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 1 << 29}  # leaves the card to others, too
ALL_WAYS = "plain,self-eager,self,self-async,close,close-async,other-async,self-sleep"
LENGTHS = [5, 17, 40, 90, 150, 33, 64]  # seven requests, four at a time: batches of 1, 2, 3 and 4


def compare_with_original(drafter: Any) -> dict[str, int]:
    """Run the original beside every replay; counts steps, replays, and tokens that differ."""
    from vllm_gemma4_spec.performance.draft_graphs import GRAPHS

    counts = {"steps": 0, "replays": 0, "padded": 0, "different": 0}
    graphs = drafter.__dict__.get(GRAPHS)
    bound = drafter.propose

    def propose(**kwargs: Any) -> Any:
        counts["steps"] += 1
        cad, rejected = kwargs["common_attn_metadata"], kwargs.get("num_rejected_tokens_gpu")
        drafts = bound(**kwargs)
        if graphs is not None and graphs.fits(cad, rejected, kwargs.get("mm_embed_inputs")):
            counts["replays"] += 1
            counts["padded"] += cad.num_reqs not in graphs.batch_sizes
            again = bound.__func__.__wrapped__(drafter, **kwargs)
            counts["different"] += int((drafts != again).sum())
        return drafts

    drafter.propose = propose
    return counts


def near_ties(llm: Any, prompts: list[list[int]], limits: list[int]) -> int:
    """Tokens of the answers whose log-probability is nearer than ``TIE`` to that of the next best."""
    from vllm import SamplingParams

    params = [
        SamplingParams(max_tokens=n, temperature=0, ignore_eos=True, detokenize=False, logprobs=2) for n in limits
    ]
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    pairs = [sorted(found.logprob for found in row.values())[-2:] for o in outputs for row in o.outputs[0].logprobs]
    return sum(best - second < TIE for second, best in pairs)


def scales(model: Path, folder: Path, prompts: list[list[int]]) -> dict[str, Any]:
    """Mean distance of the first answer token's log-probabilities from those with a 16-bit cache.

    The scaled model's keys are 512 times larger, past what fp8 holds, and its queries as much smaller: the same
    attention. Powers of two change no rounding, so with scales applied right the distance is that of an fp8 cache of
    the model as it was, or less: queries then stay in 16 bits. ``stock`` is the scaled model without the patch, and
    ``unscaled`` what a cache without scales makes of its keys. The scaled model also drafts for itself.
    """
    import torch
    from vllm import SamplingParams

    from tests.quantization.comparison import each, edited
    from tests.support import engine, kv_scales
    from vllm_gemma4_spec.quantization.patches import KV_SCALES

    # Random weights are chaotic: a rounding moves every logit as far as garbage would. With attention that adds a tenth
    # as much to the residual, what moves them stays in proportion.
    quieter = each("post_attention_layernorm.weight", lambda weight: 0.1 * weight)
    model = edited(model, folder / "quiet", quieter)
    scaled = kv_scales.with_kv_scales(model, folder / "scaled", k_scale=8.0, v_scale=2.0, k_gain=512.0)
    unscaled = kv_scales.with_kv_scales(model, folder / "unscaled", k_scale=1.0, v_scale=1.0, k_gain=512.0)
    params = SamplingParams(max_tokens=1, temperature=0, detokenize=False, logprobs=512)
    options = {"dtype": "bfloat16", "max_num_seqs": 4, "max_logprobs": 512, **MEMORY}
    out: dict[str, Any] = {}
    found: dict[str, torch.Tensor] = {}
    for way, which, dtype in (
        ("cache16", model, "auto"),
        ("fp8", model, "fp8"),
        ("unscaled", unscaled, "auto"),  # the checkpoint asks for fp8
        ("fp8-scales", scaled, "auto"),
        ("stock", scaled, "auto"),
    ):
        drafter = which if way == "fp8-scales" else None
        with engine.engine(which, drafter, K, kv_cache_dtype=dtype, **options) as llm:
            before = engine.acceptance(llm)
            outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
            rows = [o.outputs[0].logprobs[0] for o in outputs]
            found[way] = torch.tensor([[row[token].logprob for token in range(512)] for row in rows])
            row = {"from 16 bits": round(float((found[way] - found["cache16"]).abs().mean()), 5)}
            if drafter is not None:
                engine.generate(llm, prompts, TOKENS)
                spent = engine.acceptance(llm) - before
                row |= {"proposed": spent.proposed, "accepted": spent.accepted}
        out[way] = row
        print(f"{way:12s} {json.dumps(row)}", flush=True)
        if way == "fp8-scales":
            os.environ["VLLM_GEMMA4_SPEC_PATCH_KV_SCALES"] = "0"
            PATCHER.undo([KV_SCALES])
    return out


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--head-dim", type=int, default=256, help="sliding layers; full layers have twice that")
    ap.add_argument("--ways", help="default: all of them; with an fp8 cache plain,self,close-async,scales")
    ap.add_argument("--compile", type=int, default=0, choices=(0, 3))
    ap.add_argument("--kv-cache-dtype", default="auto", choices=("auto", "fp8"))
    ap.add_argument("--out", type=Path)
    args = ap.parse_args()
    fp8 = args.kv_cache_dtype == "fp8"
    if fp8:
        os.environ["VLLM_BATCH_INVARIANT"] = "1"  # before anything of vLLM is imported
    ways = args.ways or ("plain,self,close-async,scales" if fp8 else ALL_WAYS)

    from verdict import verdict

    from tests.support import engine, tiny_models

    heads = {"head_dim": args.head_dim, "global_head_dim": 2 * args.head_dim}
    folder = Path(tempfile.mkdtemp(prefix="exactness-"))
    target = tiny_models.save(tiny_models.target_config(**heads), folder / "target")
    other = tiny_models.save(tiny_models.drafter_config(**heads), folder / "drafter", seed=1)
    close = tiny_models.perturbed(target, folder / "close")
    models = {"plain": None, "self": target, "close": close, "other": other}
    prompts = engine.random_prompts(LENGTHS)
    limits = [TOKENS + 7 * i for i in range(len(prompts))]
    results: dict[str, Any] = {}
    answers: list[list[int]] | None = None
    ties = 0
    for way in ways.split(","):
        if way == "scales":
            results[way] = scales(other, folder, prompts)
            continue
        drafter = models[way.partition("-")[0]]
        sizes = [1, 2, 4] if drafter is None else [K + 1, 2 * (K + 1), 4 * (K + 1)]
        options: dict[str, Any] = {
            "enforce_eager": False,
            "max_num_seqs": 4,
            **MEMORY,
            "kv_cache_dtype": args.kv_cache_dtype,
            "compilation_config": {
                "mode": args.compile,
                "cudagraph_mode": "FULL_AND_PIECEWISE" if args.compile else "FULL_DECODE_ONLY",
                "cudagraph_capture_sizes": sizes,
            },
        }
        if drafter is not None:
            options["async_scheduling"] = way.endswith("async")
            if way.endswith("eager"):
                options["speculative"] = {"enforce_eager": True}
        options["enable_sleep_mode"] = way.endswith("sleep")
        with engine.engine(target, drafter, K, **options) as llm:
            before, counts = engine.acceptance(llm), {}
            if drafter is not None:
                runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
                counts = compare_with_original(runner.drafter)
            tokens = engine.generate(llm, prompts, limits)
            if way.endswith("sleep"):
                llm.sleep(1)
                llm.wake_up()
                woken = engine.generate(llm, prompts, limits)
                tokens = tokens if woken == tokens else woken
            spent = engine.acceptance(llm) - before
            if drafter is None:
                counts["near_ties"] = ties = near_ties(llm, prompts, limits)
        answers = answers or tokens
        same = tokens == answers
        results[way] = {"equal": same, "proposed": spent.proposed, "accepted": spent.accepted, **counts}
        print(f"{way:12s} {json.dumps(results[way])}", flush=True)
        if not same:
            for i, (a, b) in enumerate(zip(tokens, answers, strict=True)):
                at = next((j for j, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
                if at is not None:
                    print(f"  request {i} differs from token {at} on", flush=True)
    found = results.get("scales")
    bad = [
        way
        for way, r in ((way, r) for way, r in results.items() if way != "scales")
        if not r["equal"]
        or r.get("different", 0)
        or (way.startswith("self") and r["proposed"] - r["accepted"] > K * ties)
        or (way != "plain" and not way.endswith("eager") and not r["replays"])
    ]
    if found is not None:
        distance = {way: r["from 16 bits"] for way, r in found.items()}
        accepted = found["fp8-scales"]["accepted"] / found["fp8-scales"]["proposed"]  # bf16: ties in the last bit
        far = min(distance["stock"], distance["unscaled"])
        if not (distance["fp8-scales"] <= 1.2 * distance["fp8"] < far / 2 and accepted > 0.9):
            bad.append("scales")
    return verdict("exact", bad, results, args.out)


if __name__ == "__main__":
    sys.exit(main())
