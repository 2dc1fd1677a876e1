"""131,072 tokens of context with 31B's shapes on one GPU, in a KV cache that 0.19.1 fills with 21,100 at most.

    GEMMA4_ARTIFACTS=… python benchmarks/long_context.py [--drafter E4B] [--kv-gib 20] [--context 131072]

Weights are random, of full size, in NVFP4. A prompt of 64 tokens less than the context is answered alone, then beside
three short requests; with ``VLLM_GEMMA4_SPEC_PATCH_LONG_PROMPTS=0`` it waits for ever, and the script ends after
``--patience`` seconds without a step. Exits 1 if anything is not answered in full.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TOKENS = 32


def parse(argv: list[str]) -> argparse.Namespace:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--target", default="31B", choices=("31B", "26B-A4B"))
    ap.add_argument("--drafter", choices=("E4B",), help="default: none")
    ap.add_argument("--k", type=int, default=3, help="draft length")
    ap.add_argument("--context", type=int, default=131_072, help="max_model_len")
    ap.add_argument("--step", type=int, default=4096, help="max_num_batched_tokens")
    ap.add_argument("--kv-gib", type=float, default=20.0, help="KV cache")
    ap.add_argument("--patience", type=float, default=60.0, help="seconds without a scheduled token")
    ap.add_argument("--out", type=Path, default=Path("long_context.json"))
    return ap.parse_args(argv)


def answer(llm: Any, prompts: list[list[int]], patience: float) -> tuple[list[int], float]:
    """Tokens of each answer and the seconds that all took; answers are short where nothing moved any more."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True, detokenize=False)
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
    scheduler = engine.engine_core.engine_core.scheduler
    began = moved = time.perf_counter()
    lengths, computed = [0] * len(prompts), -1
    while engine.has_unfinished_requests() and time.perf_counter() - moved < patience:
        for output in engine.step():
            lengths[int(output.request_id)] = len(output.outputs[0].token_ids)
        now = sum(r.num_computed_tokens for r in scheduler.requests.values())
        if now != computed:
            computed, moved = now, time.perf_counter()
    took = time.perf_counter() - began
    engine.abort_request([str(n) for n in range(len(prompts))])
    return lengths, took


def main() -> None:
    args = parse(sys.argv[1:])
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the scheduler is looked at
    os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "fork")
    import shapes
    import vllm.model_executor.model_loader.dummy_loader as loader
    from vllm import LLM

    loader.initialize_dummy_weights = shapes.random_weights
    work = Path(tempfile.gettempdir()) / "gemma4-shapes-all"
    options: dict[str, Any] = {}
    if args.drafter:
        options["speculative_config"] = {
            "method": "draft_model",
            "model": str(shapes.write_model(args.drafter, work / "drafter")),
            "num_speculative_tokens": args.k,
        }
    llm = LLM(
        str(shapes.write_model(args.target, work / "target")),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=args.context,
        max_num_seqs=4,
        max_num_batched_tokens=args.step,
        gpu_memory_utilization=0.3,  # checked at the start only: the next line sizes the cache
        kv_cache_memory_bytes=int(args.kv_gib * 2**30),
        enable_prefix_caching=False,
        enforce_eager=True,
        **options,
    )
    longest = llm.model_config.max_model_len
    prompt = [(7 * i) % 50_000 + 100 for i in range(longest - 64)]
    short = [[(7 * i + n) % 50_000 + 100 for i in range(300)] for n in range(3)]
    rows = {}
    for name, prompts in (("alone", [prompt]), ("beside three", [prompt, *short])):
        lengths, took = answer(llm, prompts, args.patience)
        rows[name] = {"prompt": len(prompt), "answers": lengths, "seconds": round(took, 1)}
        print(name, rows[name], flush=True)
    blocks = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.num_blocks
    found = {"max_model_len": longest, "kv_gib": args.kv_gib, "blocks": blocks, "step": args.step, "runs": rows}
    args.out.write_text(json.dumps(found, indent=1))
    print(json.dumps(found))
    done = all(length == TOKENS for row in rows.values() for length in row["answers"])
    sys.exit(0 if done and longest == args.context else 1)


if __name__ == "__main__":
    main()
