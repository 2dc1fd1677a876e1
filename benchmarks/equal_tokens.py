"""How many greedy tokens of a bfloat16 model are the same whatever runs beside them, at full size on one GPU.

    GEMMA4_ARTIFACTS=… python benchmarks/equal_tokens.py --target 31B --out equal-tokens.json

One engine decodes the same prompts alone, four and sixteen at a time, and another with the target's MTP assistant
(random weights: its drafts are rejected, what is verified is five rows a request). Every answer is compared with the
one of plain decoding, one request at a time: how many of its tokens come before the first that differs. Kernels whose
rows depend on the batch end such runs early; ``--engines stock,plain,mtp@4`` shows whose do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from full_shape import environment, k_of


def parse(argv: list[str]) -> argparse.Namespace:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--target", default="31B", choices=("31B", "26B-A4B", "E4B"))
    ap.add_argument("--target-layers", type=int, help="cut the target")
    ap.add_argument("--engines", default="stock,plain,mtp@4")
    ap.add_argument("--requests", type=int, default=16)
    ap.add_argument("--tokens", type=int, default=128, help="of an answer")
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--engine", help=argparse.SUPPRESS)
    return ap.parse_args(argv)


def answers(args: argparse.Namespace) -> dict[str, list[list[int]]]:
    """Token ids of every answer, by how many requests ran at a time."""
    os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "fork")
    import shapes
    import vllm.model_executor.model_loader.dummy_loader as loader
    from vllm import LLM, SamplingParams

    loader.initialize_dummy_weights = shapes.random_weights
    work = Path(tempfile.gettempdir()) / f"gemma4-shapes-{args.target_layers or 'all'}"
    k, options = k_of(args.engine, 3), {}
    if args.engine.startswith("mtp"):
        assistant = shapes.write_assistant(args.target, work / "assistant")
        options["speculative_config"] = {"method": "mtp", "model": str(assistant), "num_speculative_tokens": k}
    llm = LLM(
        str(shapes.write_model(args.target, work / "target", args.target_layers)),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=4096,
        max_num_seqs=16,
        max_num_batched_tokens=4096,
        gpu_memory_utilization=0.3,
        kv_cache_memory_bytes=6 * 2**30,
        enable_prefix_caching=False,
        seed=0,
        compilation_config={"cudagraph_capture_sizes": sorted({n * (k + 1 if options else 1) for n in (1, 4, 16)})},
        **options,
    )
    params = SamplingParams(max_tokens=args.tokens, temperature=0.0, ignore_eos=True, detokenize=False)
    prompts = [
        {"prompt_token_ids": [(7 * i + 13 * j * j) % 50_000 + 100 for i in range(96 + 8 * j)]}
        for j in range(args.requests)
    ]
    found: dict[str, list[list[int]]] = {}
    for at_a_time in (1, 4, 16):
        outputs: list[Any] = []
        for first in range(0, len(prompts), at_a_time):
            outputs += llm.generate(prompts[first : first + at_a_time], params, use_tqdm=False)
        found[str(at_a_time)] = [list(output.outputs[0].token_ids) for output in outputs]
    return found


def agreeing(a: list[int], b: list[int]) -> int:
    """Tokens before the first that differs."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def main() -> None:
    args = parse(sys.argv[1:])
    if args.engine:
        args.out.write_text(json.dumps(answers(args)))
        return
    found: dict[str, dict[str, list[list[int]]]] = {}
    started = {}
    for engine in args.engines.split(","):
        part = args.out.with_suffix(f".{len(started)}.part")
        command = [sys.executable, __file__, *sys.argv[1:], "--engine", engine, "--out", str(part)]
        started[engine] = part, subprocess.Popen(command, env=os.environ | environment(engine))
    for engine, (part, child) in started.items():
        if child.wait() == 0:
            found[engine] = json.loads(part.read_text())
        part.unlink(missing_ok=True)
    result: dict[str, Any] = {}
    for engine, by in found.items():
        plain = engine if not engine.startswith("mtp") else next(e for e in found if e.startswith("plain"))
        for at_a_time, tokens in by.items():
            before = [agreeing(a, b) for a, b in zip(tokens, found[plain]["1"], strict=True)]
            row = {
                "equal_answers": sum(n == args.tokens for n in before),
                "of": len(before),
                "tokens_before_a_difference": sum(before),
                "of_tokens": args.tokens * len(before),
                "different_tokens_in_answers": len({t for answer in tokens for t in answer}),
            }
            result.setdefault(engine, {})[at_a_time] = row
            print(f"{engine:12s} {at_a_time:>3s} at a time: {row}", flush=True)
    args.out.write_text(json.dumps({"args": vars(args) | {"out": str(args.out)}, "engines": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
