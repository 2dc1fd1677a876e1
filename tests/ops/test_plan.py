"""The plan against what was seen in the engine, what transformers builds, and its own arithmetic."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support import tiny_models
from tests.support.commands import in_process, printed
from vllm_gemma4_spec.ops.plan import groups, model, timing

ARTIFACTS = os.environ.get("GEMMA4_ARTIFACTS")
needs_configs = pytest.mark.skipif(not ARTIFACTS, reason="GEMMA4_ARTIFACTS is unset: no genuine configs")


def genuine(name: str, weights: str = "bf16") -> model.Model:
    return model.load(Path(str(ARTIFACTS), "gemma4", "models", name), weights)


def shape(cache: groups.Cache) -> list[tuple[str, str, int, int]]:
    """Owner, attention, block size, how many groups of them, in order."""
    runs: dict[tuple[str, str, int], int] = {}
    for g in cache.groups:
        key = (g.owner, g.kind, g.block_size)
        runs[key] = runs.get(key, 0) + 1
    return [(*key, count) for key, count in runs.items()]


@needs_configs
def test_memory_is_that_of_the_card_that_was_measured() -> None:
    """26B-A4B and E4B in NVFP4 on an H200: "Model loading took 14.67 GiB", and 25.97 with the drafter."""
    target, drafter = genuine("gemma-4-26B-A4B-it", "nvfp4"), genuine("gemma-4-E4B-it", "nvfp4")
    h200 = timing.hardware()["H200"]
    copies = drafter.copies(h200.marlin, h200.memory, drafter=True)
    assert target.weight_bytes == pytest.approx(14.67 * 2**30, rel=0.04)
    assert drafter.weight_bytes + copies == pytest.approx((25.97 - 14.67) * 2**30, rel=0.03)
    assert copies > 0.2 * drafter.weight_bytes
    # Where vLLM has FP4 kernels, the drafter's lm_head alone is held twice.
    assert drafter.copies(False, h200.memory, drafter=True) == 262_144 * 2560 * 0.5625


@needs_configs
@pytest.mark.parametrize(
    ("algorithm", "hardware", "wanted"),
    [("NVFP4_AWQ", "H100", 1_734_082_560), ("NVFP4_AWQ", "L40S", 0), ("NVFP4_AWQ", "B200", 0), ("NVFP4", "H100", 0)],
)
def test_a_scaled_target_holds_o_proj_twice(tmp_path: Path, algorithm: str, hardware: str, wanted: int) -> None:
    config = json.loads(Path(str(ARTIFACTS), "gemma4/models/gemma-4-31B-it/config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    card = timing.hardware()[hardware]
    assert model.load(tmp_path).copies(card.marlin, card.memory, drafter=False) == wanted


@needs_configs
@pytest.mark.parametrize(
    ("target", "drafter", "wanted"),
    [
        ("gemma-4-31B-it", None, [("target", "sliding", 16, 5), ("target", "full", 32, 1)]),
        (
            "gemma-4-31B-it",
            "gemma-4-E4B-it",  # these 22 groups were seen on an H200, the drafter's in 16 to 21
            [
                ("target", "sliding", 16, 13),
                ("target", "full", 32, 3),
                ("drafter", "sliding", 128, 5),
                ("drafter", "full", 64, 1),
            ],
        ),
        (
            "gemma-4-26B-A4B-it",
            "gemma-4-E4B-it",  # full layers of both: 2 KV heads of 512, so 5 + 4 layers share one group
            [("target", "sliding", 16, 3), ("both", "full", 32, 1), ("drafter", "sliding", 64, 3)],
        ),
    ],
)
def test_groups_are_those_of_the_engine(
    target: str, drafter: str | None, wanted: list[tuple[str, str, int, int]]
) -> None:
    cache = groups.plan_cache(genuine(target), genuine(drafter) if drafter else None, 40 << 30, 4096)
    assert shape(cache) == wanted
    assert cache.requests > 1


@needs_configs
def test_floors_of_the_card_that_was_measured() -> None:
    """At 4.3 TB/s reading 31B in NVFP4 takes about 4.4 ms, E4B less than 1 ms."""
    assert genuine("gemma-4-31B-it", "nvfp4").read_bytes(1) / 4.3e12 == pytest.approx(4.4e-3, rel=0.03)
    assert genuine("gemma-4-E4B-it", "nvfp4").read_bytes(1) / 4.3e12 < 1e-3


@needs_configs
@pytest.mark.parametrize("name", ["gemma-4-31B-it", "gemma-4-26B-A4B-it", "gemma-4-E4B-it"])
def test_weights_are_those_that_transformers_builds(name: str) -> None:
    """But for what vLLM stores besides: K again as V, K and V of layers that reuse KV; and for norms and scalars."""
    import torch
    from transformers import Gemma4ForCausalLM

    ours = genuine(name)
    with torch.device("meta"):
        theirs = Gemma4ForCausalLM(ours.text)
    elements = sum(p.numel() for p in theirs.parameters() if p.dim() > 1)
    extra = 0
    for i in range(ours.layers):
        heads, size = ours.attention(i)
        one = int(ours.text.hidden_size) * heads * size
        if i >= ours.first_shared:
            extra += 2 * one
        elif ours.is_full(i) and ours.text.attention_k_eq_v:
            extra += one
    assert ours.weight_bytes == 2 * (elements + extra)


def test_experts_read_are_those_picked() -> None:
    changes: dict[str, Any] = {
        "enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32
    }  # fmt: skip
    one = model.Model("moe", tiny_models.target_config(**changes), "bf16")
    dense = model.Model("dense", tiny_models.target_config(), "bf16")
    expert = 3 * 64 * 32 * 2
    router = 64 * 8 * 2
    assert one.read_bytes(1) - dense.read_bytes(1) == pytest.approx(6 * (2 * expert + router))
    assert one.read_bytes(10_000) - dense.read_bytes(1) == pytest.approx(6 * (8 * expert + router))


def test_modules_left_out_of_quantization_stay_wide(tmp_path: Path) -> None:
    config = tiny_models.target_config().to_dict() | {"model_type": "gemma4_text"}
    quant = {"quant_algo": "NVFP4", "exclude_modules": ["model.language_model.layers.0.self_attn*", "lm_head"]}
    sizes = {}
    for name, changes in {"all": {}, "some": quant}.items():
        folder = tmp_path / name
        folder.mkdir()
        wanted = {"quant_algo": "NVFP4"} | changes
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": wanted}))
        sizes[name] = model.load(folder).read_bytes(1)
    kept = 64 * 32 * (4 + 2 * 2) + 64 * 32 * 4
    assert sizes["some"] - sizes["all"] == pytest.approx(kept * (2 - 0.5625))


def test_best_k() -> None:
    steps = timing.Steps(draft=1.0, target=(10.0,) * (timing.MAX_K + 1))
    assert timing.best_k(steps, timing.curve("0"), 1) == 0  # a draft costs and never pays
    assert timing.best_k(steps, timing.curve("1"), 1) == timing.MAX_K
    assert timing.tokens_per_step(timing.curve("0.8,0.6,0.5"), 3) == pytest.approx(2.9)
    half = timing.curve("0.5")
    speeds = [timing.speed(steps, half, k, 2) for k in range(timing.MAX_K + 1)]
    assert speeds[2] == pytest.approx(2 * 1.75 / 12)
    assert timing.best_k(steps, half, 2) == speeds.index(max(speeds))


@pytest.fixture
def configs(tmp_path: Path) -> list[str]:
    out = []
    for role, config in {"target": tiny_models.target_config(), "drafter": tiny_models.drafter_config()}.items():
        file = tmp_path / f"{role}.json"
        file.write_text(json.dumps(config.to_dict() | {"model_type": "gemma4_text"}))
        out += [f"--{role}", str(file)]
    return out


def test_command_json_and_plot(configs: list[str], tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    done = in_process("plan", *configs, "--context", "512", "--json", "--plot", str(picture), "--hardware", "H200")
    assert done.returncode == 0, done.stderr
    report = printed("plan", done)
    assert {g["owner"] for g in report["groups"]} == {"target", "drafter", "both"}  # equal full layers: one group
    (machine,) = report["machines"]
    assert machine["name"] == "H200"
    assert machine["step_ms"][2] == pytest.approx(machine["verify_ms"][2] + 2 * machine["draft_ms"], abs=2e-3)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_table_fits_a_narrow_pipe(configs: list[str]) -> None:
    done = in_process("plan", *configs, "--bandwidth", "100", "--memory", "4", COLUMNS="60")
    assert done.returncode == 0, done.stderr
    assert "\x1b[" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 60


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (["--target", "/nowhere"], "/nowhere"),
        (["--hardware", "abacus"], "abacus"),
        (["--acceptance", "1.5"], "1.5"),
        (["--acceptance", "0.2,0.9"], "never rise"),
        (["--target-weights", "int3"], "int3"),
        (["--kv-dtype", "int3"], "int3"),
        (["--plot", "/nowhere/plan.png"], "/nowhere/plan.png: cannot be written"),
        (["--plot", "plan.jpeg2000"], "unknown ending"),
    ],
)
def test_mistakes_are_one_line(configs: list[str], changes: list[str], word: str) -> None:
    done = in_process("plan", *configs, *changes)
    assert done.returncode == 2
    assert word in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
