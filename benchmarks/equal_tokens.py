"""How many of 10,000 greedy tokens of a full-size Gemma 4 are the same with speculation as without, in bfloat16.

    GEMMA4_ARTIFACTS=… python benchmarks/equal_tokens.py --engines stock,plain,self@3,spec@3 --out equal.json

In float32 all are (``make test-gpu``). In bfloat16 a verification of several tokens rounds otherwise than a decode
step of one wherever a kernel's order of additions depends on the batch, and near ties then fall the other way.
Engines are those of ``full_shape.py``: ``self`` drafts with the target, so that nearly every draft is accepted,
``spec`` and ``mtp`` with random models, so that none is. An engine is compared with plain decoding that has the same
``+NAME=VALUE`` settings: ``plain+VLLM_BATCH_INVARIANT=1,self@3+VLLM_BATCH_INVARIANT=1``; ``plain`` with ``stock``.
Weights are random, with layers so loud that answers do not repeat the prompt's last token (``distinct`` counts an
answer's tokens): the best token leads the second by noise alone. A trained model has fewer near ties.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import full_shape


def parse(argv: list[str]) -> argparse.Namespace:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--target", default="31B", choices=("31B", "26B-A4B", "E4B"))
    ap.add_argument("--drafter", default="E4B", choices=("E4B", "26B-A4B"), help="of spec")
    ap.add_argument("--engines", default="plain,self@3", help="of full_shape.py's")
    ap.add_argument("--requests", type=int, default=16, help="side by side")
    ap.add_argument("--tokens", type=int, default=640, help="of each answer")
    ap.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    ap.add_argument("--target-layers", type=int, help="cut the target, for a quick run")
    ap.add_argument("--compile", type=int, default=3, choices=(0, 3), help="vLLM's compilation mode")
    ap.add_argument("--kv-gib", type=float, default=20.0, help="KV cache of every engine, in GiB")
    ap.add_argument("--out", type=Path, default=Path("equal_tokens.json"))
    ap.add_argument("--engine", help=argparse.SUPPRESS)
    ap.add_argument("--turn", type=Path, help=argparse.SUPPRESS)
    args = ap.parse_args(argv)
    usual = full_shape.parse(["--concurrency", str(args.requests)])  # of what is not asked for here
    return argparse.Namespace(**vars(usual) | vars(args))


def answers(args: argparse.Namespace) -> dict[str, Any]:
    """Token ids of all answers of one engine, in this process, and its speed."""
    # All prompts are there before the first step: otherwise chance decides which are read together, and in which order
    # Marlin adds up depends on that.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["GEMMA4_SHAPES_LOUD"] = (
        "4"  # with shapes.random_weights's usual norms the embedding outshouts all layers
    )
    llm = full_shape.make_llm(args)
    from vllm import SamplingParams

    prompts = [
        {"prompt_token_ids": [(7 * i + 1013 * j) % 50_000 + 100 for i in range(args.prompt)]}
        for j in range(args.requests)
    ]

    def run(tokens: int) -> Any:
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        return llm.generate(prompts, params, use_tqdm=False)

    held = full_shape.my_turn(args)  # noqa: F841
    run(24)
    began = time.perf_counter()
    outputs = run(args.tokens)
    seconds = time.perf_counter() - began
    counts = {m.name: m.value for m in llm.get_metrics() if "spec_decode" in m.name and hasattr(m, "value")}
    return {
        "tokens": [list(o.outputs[0].token_ids) for o in outputs],
        "distinct": statistics.median(len(set(o.outputs[0].token_ids)) for o in outputs),
        "tokens_per_s": round(args.requests * args.tokens / seconds, 1),
        "drafted": counts.get("vllm:spec_decode_num_draft_tokens", 0),
        "accepted": counts.get("vllm:spec_decode_num_accepted_tokens", 0),
    }


def compared(ours: list[list[int]], plain: list[list[int]]) -> dict[str, Any]:
    """How far answers agree; what follows the first difference is another text and says nothing."""
    same = []
    for mine, theirs in zip(ours, plain, strict=True):
        pairs = enumerate(zip(mine, theirs, strict=True))
        same.append(next((i for i, (a, b) in pairs if a != b), len(mine)))
    differ = sum(n < len(x) for n, x in zip(same, ours, strict=True))
    return {
        "equal_answers": len(ours) - differ,
        "answers": len(ours),
        "tokens_until_the_first_difference": sum(same),
        "tokens": sum(map(len, ours)),
        "decided_otherwise": round(
            differ / max(1, sum(same) + differ), 6
        ),  # of the tokens that had the same text before
    }


def reference(engine: str, engines: list[str]) -> str | None:
    """Plain decoding with the same settings: the package's, and for that stock's."""
    settings = engine.split("+")[1:]
    names = ("plain", "stock") if full_shape.speculates(engine) else ("stock",)
    wanted = ["+".join([name, *settings]) for name in names]
    return next((name for name in wanted if name in engines and name != engine), None)


def main() -> None:
    args = parse(sys.argv[1:])
    if args.engine:
        args.out.write_text(json.dumps(answers(args)))
        return
    engines = args.engines.split(",")
    parts = {engine: args.out.with_suffix(f".{full_shape.file_name(engine)}.part") for engine in engines}
    turn = args.out.with_suffix(".turn")
    running = full_shape.start_together(__file__, parts, turn)
    seen = {engine: json.loads(parts[engine].read_text()) for engine, run in running.items() if run.wait() == 0}
    results: dict[str, Any] = {}
    for engine in engines:
        if engine not in seen:
            results[engine] = {"failed": running[engine].returncode}
            continue
        results[engine] = {k: v for k, v in seen[engine].items() if k != "tokens"}
        other = reference(engine, [e for e in engines if e in seen])
        if other:
            results[engine] |= {"against": other, **compared(seen[engine]["tokens"], seen[other]["tokens"])}
        print(engine, results[engine], flush=True)
    for file in (turn, *parts.values()):
        file.unlink(missing_ok=True)
    args.out.write_text(json.dumps({"args": vars(args) | {"out": str(args.out)}, "engines": results}, indent=1))


if __name__ == "__main__":
    main()
