"""Two tensor-parallel ranks on one GPU: the kernels of every rank, without a second card.

    TRITON_F32_DEFAULT=ieee python benchmarks/gpu_two_ranks.py [--out two-ranks.json]

NCCL refuses two ranks on one card, so collectives go through gloo and nothing is captured in a CUDA graph: this says
that sharding, drafting and NVFP4 are right on a GPU, not how fast they are. Both ranks are processes of vLLM's
multiprocessing executor. Tiny models with head_dim 256 / 512 in float32: the answers equal plain decoding's on one
rank and a model by itself has every draft accepted. NVFP4_AWQ goes through Marlin in float16, and in bfloat16 through
the kernel for few rows where it takes over; there a rounding may turn an answer, so the log-probabilities of first
tokens are compared with one rank's. Exits 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "fork")  # ranks inherit what is set up below
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

K, TOKENS = 3, 32
FIXTURES = Path(__file__).resolve().parents[1] / "tests" / "checkpoints" / "wide"
LIMITS = {"float16": 0.02, "bfloat16": 0.1}  # mean difference of log-probabilities between one rank and two


def share_the_card() -> None:
    """Before CUDA starts: every rank takes device 0 and talks to the others through gloo."""
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu_worker import Worker

    platform = type(current_platform)
    platform.dist_backend = "gloo"
    communicator = "vllm.distributed.device_communicators.base_device_communicator.DeviceCommunicatorBase"
    platform.get_device_communicator_cls = classmethod(lambda _: communicator)

    original = Worker.init_device

    def init_device(worker: Any) -> None:
        worker.local_rank = 0
        worker.parallel_config.data_parallel_backend = "ray"  # leaves out the check that there is a card for each rank
        original(worker)

    Worker.init_device = init_device


def run(model: Path, drafter: Path | None, ranks: int, prompts: list[list[int]], **options: Any) -> dict[str, Any]:
    """In a process of its own, because the ranks are forked from it."""
    from vllm import SamplingParams

    from tests.support import engine

    if ranks > 1:
        options |= {"tensor_parallel_size": ranks, "distributed_executor_backend": "mp"}
    options |= {"max_num_seqs": 4, "gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 1 << 29}
    with engine.engine(model, drafter, K, max_logprobs=20, **options) as llm:
        before = engine.acceptance(llm)
        tokens = engine.generate(llm, prompts, TOKENS)
        spent = engine.acceptance(llm) - before
        params = SamplingParams(max_tokens=1, temperature=0, detokenize=False, logprobs=20)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        rows = [{t: row.logprob for t, row in o.outputs[0].logprobs[0].items()} for o in outputs]
    return {"tokens": tokens, "logprobs": rows, "proposed": spent.proposed, "accepted": spent.accepted}


def apart(function: Any, *args: Any, **kwargs: Any) -> Any:
    """What ``function`` returns in a forked process."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        code = 1
        try:
            with os.fdopen(send, "w") as stream:
                json.dump(function(*args, **kwargs), stream)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(send)
    with os.fdopen(receive) as stream:
        text = stream.read()
    if os.waitpid(child, 0)[1] or not text:
        raise RuntimeError(f"{function.__name__} failed")
    return json.loads(text)


def distance(one: list[dict[str, float]], other: list[dict[str, float]]) -> float:
    """Mean absolute difference over the tokens that both rank among the first."""
    differences = [abs(a[t] - b[t]) for a, b in zip(one, other, strict=True) for t in set(a) & set(b)]
    return sum(differences) / len(differences)


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--head-dim", type=int, default=256, help="sliding layers; full layers have twice that")
    ap.add_argument("--out", type=Path)
    args = ap.parse_args()

    from verdict import verdict

    from tests.support import engine, tiny_models

    heads = {"head_dim": args.head_dim, "global_head_dim": 2 * args.head_dim}
    folder = Path(tempfile.mkdtemp(prefix="two-ranks-"))
    target = tiny_models.save(tiny_models.target_config(**heads), folder / "target")
    drafter = tiny_models.save(tiny_models.drafter_config(**heads), folder / "drafter", seed=1)
    close = tiny_models.perturbed(target, folder / "close")
    small = {"max_model_len": 128, "max_num_batched_tokens": 128, "num_gpu_blocks_override": 256}
    half, brain = ({**small, "dtype": dtype, "speculative": {"quantization": "modelopt"}} for dtype in LIMITS)
    prompts = engine.random_prompts((1, 17, 65, 200))
    short = engine.random_prompts((3, 17, 40), vocab=96)
    awq, e4b = FIXTURES / "wide-31b-awq-full", FIXTURES / "wide-e4b-awq-lite"
    cases: dict[str, tuple[Path, Path | None, dict[str, Any]]] = {
        "self": (target, target, {}),
        "self, local argmax": (target, target, {"speculative": {"use_local_argmax_reduction": True}}),
        "E4B-like by itself": (drafter, drafter, {}),
        "close": (target, close, {}),
        "E4B-like drafter": (target, drafter, {}),
        "NVFP4_AWQ self": (awq, awq, half),
        "NVFP4_AWQ, E4B-like": (awq, e4b, half),
        "NVFP4_AWQ self, bfloat16": (awq, awq, brain),
    }
    share_the_card()
    plain: dict[tuple[Path, str], dict[str, Any]] = {}
    results: dict[str, Any] = {}
    bad = []
    for name, (model, helper, options) in cases.items():
        dtype = options.get("dtype", "float32")
        asked = prompts if dtype == "float32" else short
        if (model, dtype) not in plain:
            without = {key: value for key, value in options.items() if key != "speculative"}
            plain[model, dtype] = apart(run, model, None, 1, asked, **without)
        want, found = plain[model, dtype], apart(run, model, helper, 2, asked, **options)
        same = sum(a == b for a, b in zip(found["tokens"], want["tokens"], strict=True))
        far = distance(found["logprobs"], want["logprobs"])
        row = {"equal": f"{same} of {len(asked)}", "logprobs apart": round(far, 6)}
        row |= {"proposed": found["proposed"], "accepted": found["accepted"]}
        results[name] = row
        print(f"{name:26s} {json.dumps(row)}", flush=True)
        exact = dtype == "float32"
        wrong = same < len(asked) if exact else far > LIMITS[dtype]
        share = row["accepted"] / row["proposed"]
        wrong |= model == helper and (share < 1 if exact else share < 0.9)
        if wrong:
            bad.append(name)
    return verdict("right", bad, results, args.out)


if __name__ == "__main__":
    sys.exit(main())
