"""Full-size Gemma 4 on one GPU or several, with and without speculation, in one run.

    GEMMA4_ARTIFACTS=… python benchmarks/full_shape.py --target 31B --drafter E4B --out results.json

Every engine is a process of its own: ``stock`` (plain decoding without this package), ``plain`` (with it), ``awq``
and ``svd`` (that in NVFP4_AWQ and NVFP4_SVD), ``spec`` (speculation with ``--drafter``), ``mtp`` (with the target's
MTP assistant), ``self`` (the target drafts for itself) and, on request, ``spec-adaptive`` (adaptive k) and what a
part is worth: ``spec-eager`` (without the graphs), ``spec-sync`` (without async scheduling), ``spec-plain-compile``
(without the drafter's own compiler settings), ``spec-whole`` (a whole drafter on each rank of ``--tp``); ``spec@5``
is ``spec`` with k = 5, ``plain+NAME=VALUE`` is ``plain`` with that variable set. One run with both drafters beside
stock's plain decoding:

    … --together --engines stock,spec@3,mtp@4 --concurrency 1,4,16 --acceptance 1.0,0.8,0.0 --repeats 2

Times exclude prompts (``prompts`` is theirs, ms until the last request's first token) and a warm-up of every batch
size. tok/s and ``prompts`` are medians of ``--repeats``, other times those of the run in the middle. ``answers`` is a
hash of the tokens, one for each of those that came out.
With ``--tp 2`` every engine has two ranks, one card each; times and bytes are the first rank's.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ENGINES: dict[str, dict[str, str]] = {
    "stock": {"VLLM_GEMMA4_SPEC": "0"},
    "plain": {},
    "awq": {},
    "svd": {},
    "spec": {},
    "spec-adaptive": {"VLLM_GEMMA4_SPEC_ADAPTIVE_K": "0.16"},
    "spec-plain-compile": {"VLLM_GEMMA4_SPEC_PATCH_DRAFT_COMPILE": "0"},
    "spec-sync": {},
    "spec-whole": {},
    "spec-eager": {"VLLM_GEMMA4_SPEC_PATCH_DRAFT_GRAPHS": "0"},
    "self": {},
    "mtp": {},
    "mtp-adaptive": {"VLLM_GEMMA4_SPEC_ADAPTIVE_K": "0.16"},
    "mtp-eager": {"VLLM_GEMMA4_SPEC_PATCH_DRAFT_GRAPHS": "0"},
    "mtp-sync": {},
}


def parse(argv: list[str]) -> argparse.Namespace:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--target", default="31B", choices=("31B", "26B-A4B", "E4B"))
    ap.add_argument("--drafter", default="E4B", choices=("E4B", "26B-A4B"), help="of spec")
    ap.add_argument("--k", type=int, default=3, help="draft length")
    ap.add_argument("--engines", default="stock,plain,spec", help=f"of {', '.join(ENGINES)}")
    ap.add_argument("--concurrency", default="1,2,4,8,16")
    ap.add_argument(
        "--acceptance",
        default="1.0,0.7,0.0",
        help="chances that a draft position is accepted; 0.3/0.9: of every two requests one has each",
    )
    ap.add_argument("--tokens", type=int, default=128, help="tokens generated per request")
    ap.add_argument("--prompt", default="128", help="tokens of a prompt; 128,3000,30000: measured one after the other")
    ap.add_argument("--prefix-caching", action="store_true", help="read each prompt once; `prompts` then says nothing")
    ap.add_argument("--repeats", type=int, default=3)
    ap.add_argument("--target-layers", type=int, help="cut the target, for a quick run of the drafter")
    ap.add_argument("--compile", type=int, default=3, choices=(0, 3), help="vLLM's compilation mode")
    ap.add_argument("--inductor", type=json.loads, default={}, help="JSON: vLLM's inductor_compile_config")
    ap.add_argument(
        "--graphs", type=int, default=0, help="CUDA graphs up to so many tokens, beside those of the batches"
    )
    ap.add_argument("--kv-gib", type=float, default=6.0, help="KV cache of every engine, in GiB")
    ap.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks, one card each")
    ap.add_argument("--together", action="store_true", help="start all engines at once; they are measured in turn")
    ap.add_argument("--profile", action="store_true", help="list the kernels of one step, and of one draft")
    ap.add_argument(
        "--host", action="store_true", help="also prompts' steps on host and card, and the host's by function"
    )
    ap.add_argument("--out", type=Path, default=Path("full_shape.json"))
    ap.add_argument("--engine", help=argparse.SUPPRESS)
    ap.add_argument("--turn", type=Path, help=argparse.SUPPRESS)  # a file to be locked while measuring
    return ap.parse_args(argv)


def k_of(engine: str, k: int) -> int:
    """``spec@5`` -> 5; ``spec`` -> ``k``."""
    return int(engine.partition("+")[0].partition("@")[2] or k)


def prompt_lengths(args: argparse.Namespace) -> list[int]:
    return [int(length) for length in str(args.prompt).split(",")]


def file_name(engine: str) -> str:
    return engine.replace("/", "_")


def environment(engine: str) -> dict[str, str]:
    """What ``spec@5+NAME=VALUE`` sets."""
    name, *settings = engine.split("+")
    return ENGINES[name.partition("@")[0]] | dict(setting.split("=", 1) for setting in settings)


def speculates(engine: str) -> bool:
    return engine.startswith(("spec", "mtp", "self"))


def make_llm(args: argparse.Namespace) -> Any:
    """``vllm.LLM`` of ``args.engine``, in this process, with room for as many requests as ``args`` asks for at most."""
    k = k_of(args.engine, args.k)
    os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "fork")  # the hooks below must be inherited
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    import shapes
    import vllm.model_executor.model_loader.dummy_loader as loader
    from vllm import LLM

    loader.initialize_dummy_weights = shapes.random_weights
    sizes = [int(c) for c in args.concurrency.split(",")]
    # The same for every run: the folder's name is part of vLLM's compile cache key.
    work = Path(tempfile.gettempdir()) / f"gemma4-shapes-{args.target_layers or 'all'}"
    form = args.engine.partition("+")[0]
    algorithm = f"NVFP4_{form.upper()}" if form in ("awq", "svd") else "NVFP4"
    folder = work / (f"target-{form}" if form in ("awq", "svd") else "target")
    target = shapes.write_model(args.target, folder, args.target_layers, algorithm)
    query = k + 1 if speculates(args.engine) else 1
    graphs = {n * query for n in sizes} | set(range(8 * query, args.graphs + 1, 8 * query))
    options: dict[str, Any] = {}
    if speculates(args.engine):
        if args.engine.startswith("mtp"):
            drafter, method = shapes.write_assistant(args.target, work / "assistant"), "mtp"
        elif args.engine.startswith("self"):
            drafter, method = target, "draft_model"
        else:
            drafter, method = shapes.write_model(args.drafter, work / "drafter"), "draft_model"
        options["speculative_config"] = {"method": method, "model": str(drafter), "num_speculative_tokens": k}
        if args.engine.startswith("spec-whole"):
            options["speculative_config"]["draft_tensor_parallel_size"] = 1
    if args.tp > 1:
        options |= {"tensor_parallel_size": args.tp, "distributed_executor_backend": "mp"}
    if args.engine.partition("+")[0].partition("@")[0].endswith("-sync"):
        options["async_scheduling"] = False
    return LLM(
        str(target),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=max(4096, max(prompt_lengths(args)) + args.tokens),
        max_num_seqs=max(sizes),
        max_num_batched_tokens=4096,
        gpu_memory_utilization=0.3,  # checked at the start only: the next line sizes the cache
        kv_cache_memory_bytes=int(args.kv_gib * 2**30),
        enable_prefix_caching=args.prefix_caching,
        disable_log_stats=False,
        seed=0,
        compilation_config={
            "mode": args.compile,
            "inductor_compile_config": args.inductor,
            "cudagraph_mode": "FULL_AND_PIECEWISE" if args.compile else "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": sorted(graphs),
        },
        **options,
    )


def my_turn(args: argparse.Namespace) -> Any:
    """Tells that this engine is ready and waits until it may measure; to be kept: it lets go when the process ends."""
    if not args.turn:
        return None
    turn = args.turn.open("w")
    args.turn.with_suffix(f".{file_name(args.engine)}").touch()
    fcntl.flock(turn, fcntl.LOCK_EX)
    return turn


def run_engine(args: argparse.Namespace) -> dict[str, Any]:
    """One engine, in this process."""
    import probes

    sizes = [int(c) for c in args.concurrency.split(",")]
    speculative = speculates(args.engine)
    began = time.perf_counter()
    llm = make_llm(args)
    from vllm import SamplingParams

    result: dict[str, Any] = {"start_s": round(time.perf_counter() - began, 1), "runs": []}
    rpc = llm.collective_rpc
    held = my_turn(args)  # noqa: F841
    result["finite_logits"] = rpc(probes.finite)[0]
    result |= rpc(probes.bandwidth_and_bytes)[0]
    rpc(probes.install_marks)

    def generate(length: int, n: int, tokens: int) -> tuple[float, dict[str, Any]]:
        prompts = [{"prompt_token_ids": [(7 * i + 13 * j) % 50_000 + 100 for i in range(length)]} for j in range(n)]
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        rpc(probes.switch_marks, args=(True,))
        outputs = llm.generate(prompts, params, use_tqdm=False)
        stats = [o.metrics for o in outputs]
        first, last = max(s.first_token_ts for s in stats), max(s.last_token_ts for s in stats)
        prompts_ms = round((first - min(s.scheduled_ts for s in stats)) * 1e3, 1)
        answers = hashlib.sha256(json.dumps([list(o.outputs[0].token_ids) for o in outputs]).encode()).hexdigest()[:12]
        ranks = rpc(probes.read_marks)
        return (tokens - 1) * n / (last - first), ranks[0] | {
            "late": sorted({what for rank in ranks for what in rank["late"]}),
            "prompts": prompts_ms,
            "answers": answers,
        }

    def mixed(length: int, n: int, kinds: int) -> tuple[float, dict[str, Any]]:
        """As many runs as there are kinds of requests, so that each kind generates the same number of tokens."""
        runs = [generate(length, n, args.tokens) for _ in range(kinds)]
        return statistics.harmonic_mean([speed for speed, _ in runs]), runs[-1][1]

    for rate in args.acceptance.split(",") if speculative else [None]:
        if rate is not None:
            rpc(probes.force_acceptance, args=([float(chance) for chance in rate.split("/")],))
        for length, n in itertools.product(prompt_lengths(args), sizes):
            _, first = generate(length, n, 24)
            runs = [mixed(length, n, rate.count("/") + 1 if rate else 1) for _ in range(args.repeats)]
            speeds = sorted(r[0] for r in runs)
            middle = statistics.median_low(speeds)
            row = {
                "prompt": length,
                "concurrency": n,
                "acceptance": float(rate) if rate and "/" not in rate else rate,
                "tokens_per_s": round(middle, 1),
                "spread": [round(speeds[0], 1), round(speeds[-1], 1)],
                **next(r[1] for r in runs if r[0] == middle),
                "prompts": statistics.median(r[1]["prompts"] for r in runs),
                "prompts_each": [r[1]["prompts"] for r in runs],
                "longest_each": [r[1]["longest"] for r in runs],
                "late": sorted({what for r in runs for what in r[1]["late"]}),
                "late_in_warm_up": first["late"],
                "answers": "/".join(sorted({r[1]["answers"] for r in runs})),
            }
            print(args.engine, row, flush=True)
            result["runs"].append(row)
    if args.host:
        result["host"] = {}
        for length, n in itertools.product(prompt_lengths(args), sizes):
            for profiled in (False, True):
                generate(length, n, args.tokens)
                rpc(probes.host_begins, args=(profiled,))
                _, marks = generate(length, n, args.tokens)
                found = rpc(probes.host_ends)[0] | {"prompts": marks["prompts"]}
                found["calls"] = found["calls"][:16]
                result["host"][f"{n} x {length}" + ", by function" * profiled] = found
                print(
                    args.engine,
                    f"host, {n} x {length}: {found['prompts']} ms",
                    *found["calls"],
                    *found["functions"],
                    sep="\n",
                    flush=True,
                )
    longest = max(prompt_lengths(args))
    if args.profile:
        for n in sizes:
            generate(longest, n, 24)
            rpc(probes.profile_begins)
            generate(longest, n, 24)
            kernels = rpc(probes.profile_ends)[0]
            result.setdefault("raw", {})[n] = kernels
            decoding = [k for k in kernels if k[1] > 0.3 * kernels[-1][1]]  # the prompts are behind
            lines = [*kernel_table(decoding).splitlines(), *layer_lines(decoding)]
            result.setdefault("steps", {})[n] = lines
            print(args.engine, f"some steps of {n}:", *lines, sep="\n", flush=True)
    if speculative:
        result["draft_parts"] = rpc(probes.draft_parts, args=(sizes, longest + args.tokens))[0]
        print(args.engine, "draft parts", result["draft_parts"], flush=True)
        if args.profile:
            result["profile"] = rpc(probes.profile_replay, args=(sizes[0],))[0]
            print(kernel_table(result["profile"]), flush=True)
            result["linears"] = rpc(probes.linear_times, args=(1, result["bandwidth"]))[0]
            print("\n".join(str(row) for row in result["linears"]), flush=True)
    return result


def kernel_table(kernels: list[tuple[str, float, float]], top: int = 30) -> str:
    """Kernels of one draft by total time, and what lies between them."""
    names = sorted({name for name, _, _ in kernels})
    rows = [
        (sum(us for n, _, us in kernels if n == name), sum(n == name for n, _, _ in kernels), name) for name in names
    ]
    busy = sum(row[0] for row in rows)
    span = kernels[-1][1] + kernels[-1][2] if kernels else 0.0
    lines = [f"{span:.0f} us, {len(kernels)} kernels busy for {busy:.0f} us"]
    rows.sort(reverse=True)
    lines += [f"{total:9.1f} us {count:5d} x {total / count:7.2f}  {name}" for total, count, name in rows[:top]]
    return "\n".join(lines)


def layer_lines(kernels: list[tuple[str, float, float]]) -> list[str]:
    """What a step takes (one argmax each; the first third may hold prompts), and the kernels of two layers in order."""
    marks = [i for i, kernel in enumerate(kernels) if "ArgMax" in kernel[0]]
    marks = marks[len(marks) // 3 :]
    steps = len(marks) - 1
    if steps < 1:
        return []
    whole = kernels[marks[0] : marks[-1]]
    span = (kernels[marks[-1]][1] - kernels[marks[0]][1]) / steps
    lines = [
        f"{steps} steps of {span:.0f} us, {len(whole) / steps:.0f} kernels, busy {sum(k[2] for k in whole) / steps:.0f}"
    ]
    middle = marks[steps // 2] + int(len(whole) / steps * 0.4)
    attention = [
        i for i in range(middle, len(kernels)) if "attention" in kernels[i][0] or "_few_queries" in kernels[i][0]
    ]
    attention = [i for i in attention if i - 1 not in attention][:3]
    if len(attention) < 3:
        return lines
    begin = kernels[attention[0]][1]
    for name, at, us in kernels[attention[0] : attention[2] + 1]:
        lines.append(f"{at - begin:9.1f} us {us:8.2f}  {name[:100]}")
    return lines


def table(results: dict[str, Any]) -> str:
    """tok/s of every engine, and of speculation over plain decoding."""
    plain = sorted((e for e in results if e.startswith(("stock", "plain"))), key=lambda e: not e.startswith("stock"))
    rows = results[plain[0]].get("runs", []) if plain else []
    base = {(r["prompt"], r["concurrency"]): r["tokens_per_s"] for r in rows}
    lines = ["engine              accept  prompt    c    tok/s  ratio    step  verify  sampling  draft    gap (ms)"]
    for engine, result in results.items():
        for r in result.get("runs", []):
            of = r["prompt"], r["concurrency"]
            ratio = f"{r['tokens_per_s'] / base[of]:5.2f}" if of in base else "    -"
            times = "  ".join(f"{r.get(p, float('nan')):6.2f}" for p in ("step", "verify", "sampling", "draft", "gap"))
            accept = "-" if r["acceptance"] is None else str(r["acceptance"])
            lines.append(f"{engine:18s} {accept:>7s} {of[0]:7d} {of[1]:4d} {r['tokens_per_s']:8.1f}  {ratio}  {times}")
    return "\n".join(lines)


def start(script: str, engine: str, part: Path, turn: Path | None) -> subprocess.Popen[bytes]:
    """One engine's process: ``script`` as this process was called, which writes ``part``."""
    env = os.environ | environment(engine) | {"VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "INFO")}
    extra = ["--engine", engine, "--out", str(part), *(["--turn", str(turn)] if turn else [])]
    return subprocess.Popen([sys.executable, script, *sys.argv[1:], *extra], env=env)


def start_together(script: str, parts: dict[str, Path], turn: Path) -> dict[str, subprocess.Popen[bytes]]:
    """All engines at once; none measures while another still compiles."""
    with turn.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        running = {engine: start(script, engine, part, turn) for engine, part in parts.items()}
        marks = {engine: turn.with_suffix(f".{file_name(engine)}") for engine in parts}
        while any(running[e].poll() is None and not marks[e].exists() for e in parts):
            time.sleep(1)
    for mark in marks.values():
        mark.unlink(missing_ok=True)
    return running


def main() -> None:
    args = parse(sys.argv[1:])
    if args.engine:
        args.out.write_text(json.dumps(run_engine(args)))
        return
    results: dict[str, Any] = {}
    parts = {engine: args.out.with_suffix(f".{file_name(engine)}.part") for engine in args.engines.split(",")}
    turn = args.out.with_suffix(".turn")
    running = start_together(__file__, parts, turn) if args.together else {}
    for engine, out in parts.items():
        code = (running.get(engine) or start(__file__, engine, out, None)).wait()
        results[engine] = json.loads(out.read_text()) if code == 0 else {"failed": code}
        out.unlink(missing_ok=True)
        args.out.write_text(json.dumps({"args": vars(args) | {"out": str(args.out)}, "engines": results}, indent=1))
    turn.unlink(missing_ok=True)
    for engine, result in results.items():
        if "bandwidth" in result:
            reads = result["target"] + result.get("drafter", 0.0) * k_of(engine, args.k)
            print(f"{engine}: floor {reads / result['bandwidth'] * 1e3:.2f} ms a step "
                  f"({reads:.2f} GB at {result['bandwidth']:.0f} GB/s); start {result['start_s']} s")  # fmt: skip
    print(table(results))


if __name__ == "__main__":
    main()
