"""31B's, E4B's and 26B-A4B's layers in ModelOpt NVFP4 on the backend that vLLM picks (Hopper: Marlin), against float32.

Every error must stay below its limit, and every mistake that a decoder could make at least five times above the error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from tests.gpu import nvfp4
from tests.gpu.nvfp4 import DEVICE, ODD_ROWS, Tensors, relative, weights
from tests.gpu.parts import REHEARSAL

pytestmark = pytest.mark.gpu
# name -> (kind of layer, K, outputs); K of o_proj differs between sliding and full layers
TARGET: dict[str, tuple[str, int, list[int]]] = {
    "qkv_proj": ("merged", 5376, [8192, 4096, 4096]),
    "o_proj sliding": ("row", 8192, [5376]),
    "o_proj full": ("row", 16384, [5376]),
    "gate_up_proj": ("merged", 5376, [21504, 21504]),
    "down_proj": ("row", 21504, [5376]),
}
DRAFTER: dict[str, tuple[str, int, list[int]]] = {
    "qkv_proj": ("merged", 2560, [2048, 512, 512]),
    "gate_up_proj": ("merged", 2560, [10240, 10240]),
    "o_proj": ("row", 2048, [2560]),
    "down_proj": ("row", 10240, [2560]),
    "per_layer_input_gate": ("merged", 2560, [256]),
}
if REHEARSAL:
    TARGET = {"gate_up_proj": ("merged", 256, [512, 512]), "down_proj": ("row", 512, [256])}
    DRAFTER = {"o_proj": ("row", 512, [256])}
ROWS = (1, 4, 5, 16, 20, 64, 80, 128, 200)


@pytest.fixture(scope="module", autouse=True)
def _world(_runs_here: None) -> Iterator[None]:
    with nvfp4.world():
        yield


def check(layer: Any, members: list[Tensors], limit: float) -> dict[str, float]:
    """Worst relative error over :data:`ROWS`, and how near the nearest mistake comes."""
    columns = members[0]["weight"].shape[1] * 2
    right, swapped, saturated = (weights(members, **m).T for m in ({}, {"swapped": True}, {"saturated": True}))
    scale, few = members[0]["pre_quant_scale"], [*ODD_ROWS]
    worst, nearest = 0.0, float("inf")
    for rows in ROWS:
        generator = torch.Generator(device=DEVICE).manual_seed(rows)
        x = torch.randn(rows, columns, generator=generator, device=DEVICE).bfloat16()
        with torch.inference_mode():
            y = layer.quant_method.apply(layer, x)
        xs = (x * scale).float()  # in the activation's dtype, as every backend must
        branch = torch.zeros((), device=DEVICE)
        if "svdquant_lora_a" in members[0]:
            parts = [xs @ p["svdquant_lora_a"].float().T @ p["svdquant_lora_b"].float().T for p in members]
            branch = torch.cat(parts, -1)
        truth = xs @ right + branch
        mistakes = {
            "no pre_quant_scale": relative(x.float() @ right + branch, truth),
            "pre_quant_scale divides": relative((x.float() / scale.float()) @ right + branch, truth),
            "nibbles swapped": relative(xs @ swapped + branch, truth),
            # The repaired blocks are few, so the rows that hold them are looked at alone.
            "destroyed blocks at 448": relative((xs @ saturated + branch)[:, few], truth[:, few]),
        }
        if branch.dim():
            mistakes["branch dropped"] = relative(xs @ right, truth)
        errors = {"all": relative(y, truth), "NaN and far scales": relative(y[:, few], truth[:, few])}
        assert max(errors.values()) < limit, (rows, errors)
        assert min(mistakes.values()) > 5 * max(errors.values()), (rows, errors, mistakes)
        worst, nearest = max(worst, *errors.values()), min(nearest, *mistakes.values())
    return {"error": round(worst, 5), "nearest_mistake": round(nearest, 4)}


@pytest.mark.parametrize("rank", [0, 32], ids=["awq", "svd"])
@pytest.mark.parametrize("name", TARGET)
def test_a_targets_linear(name: str, rank: int, measured: Any) -> None:
    """Up to 128 rows by the streaming kernel, with what it takes in of scale and branch, and Marlin above."""
    kind, columns, outputs = TARGET[name]
    members = [nvfp4.tensors(n, columns, seed, rank) for seed, n in enumerate(outputs)]
    layer = nvfp4.linear(name.split()[0], kind, columns, outputs, members, streams=True)
    if not REHEARSAL:
        assert layer.streamed
        assert layer.stream_branch == bool(rank)
        assert layer.stream_scaled == (not rank and name.startswith("o_proj"))
    measured(**check(layer, members, 0.02), backend=str(layer.quant_method.backend))
    if not REHEARSAL:
        x = torch.randn(64, columns, device=DEVICE).bfloat16()
        with torch.inference_mode():
            whole = layer.quant_method.apply(layer, x)
            for rows in (1, 4, 5, 8, 9, 16, 17, 32, 33, 48, 49, 63):
                y = layer.quant_method.apply(layer, x[:rows].contiguous())
                assert torch.equal(y, whole[:rows]), f"other bits at {rows} rows than at 64"


def test_a_targets_activation(cuda: None, measured: Any) -> None:
    """gelu(gate) * up is as exact as with a kernel for it behind, and a row the same in every batch of up to 64."""
    from vllm_gemma4_spec.kernels import stream_gemm
    from vllm_gemma4_spec.quantization import activations

    kind, columns, outputs = TARGET["gate_up_proj"]
    members = [nvfp4.tensors(n, columns, seed, 0) for seed, n in enumerate(outputs)]
    layer = nvfp4.linear("gate_up_proj", kind, columns, outputs, members, streams=True)
    x = torch.randn(128, columns, device=DEVICE).bfloat16()
    scaled = (x * members[0]["pre_quant_scale"]).float()
    gate, up = (scaled @ weights(members).T).chunk(2, -1)
    x = (x.float() / gate.std()).bfloat16()  # gates of some units: beyond, gelu is the identity or zero
    gate, up = ((x * members[0]["pre_quant_scale"]).float() @ weights(members).T).chunk(2, -1)
    truth = torch.nn.functional.gelu(gate, approximate="tanh") * up
    with torch.inference_mode():
        apart = {rows: stream_gemm.activated(layer.quant_method.apply(layer, x[:rows])) for rows in (1, 16, 64, 128)}
        with mock.patch.object(stream_gemm, "faster", return_value=stream_gemm.ALL):
            assert activations.fuse(layer)
        fused = {rows: layer.quant_method.apply(layer, x[:rows].contiguous()) for rows in range(1, 129)}
    errors = {rows: (relative(fused[rows], truth[:rows]), relative(y, truth[:rows])) for rows, y in apart.items()}
    assert all(ours <= 1.05 * before for ours, before in errors.values()), errors
    for rows in range(1, 65):
        assert torch.equal(fused[rows], fused[64][:rows]), f"other bits at {rows} rows than at 64"
    assert all(relative(fused[rows], truth[:rows]) < 0.02 for rows in fused)
    assert not stream_gemm.SCRATCH.on(x.device)[1].any()
    measured(error=round(max(ours for ours, _ in errors.values()), 5))


@pytest.mark.parametrize("name", DRAFTER)
def test_a_drafters_linear(name: str, measured: Any) -> None:
    """The small-batch GEMM, with its own copy of the weights, and Marlin above."""
    kind, columns, outputs = DRAFTER[name]
    members = [nvfp4.tensors(n, columns, seed, 0) for seed, n in enumerate(outputs)]
    layer = nvfp4.linear(name.split()[0], kind, columns, outputs, members, drafter=True)
    if not REHEARSAL:
        assert getattr(layer, "rows_codes", None) is not None, "the small-batch GEMM did not take the layer over"
    measured(**check(layer, members, 0.02))


def test_the_small_batch_gemm_equals_marlin(cuda: None, measured: Any) -> None:
    """Both on the same layer: only the order of additions and bfloat16's rounding differ."""
    from vllm.model_executor.layers.quantization.utils.marlin_utils_fp4 import apply_fp4_marlin_linear

    from vllm_gemma4_spec.quantization import small_batch_layers

    worst = 0.0
    for name, (kind, columns, outputs) in DRAFTER.items():
        members = [nvfp4.tensors(n, columns, seed, 0) for seed, n in enumerate(outputs)]
        for parts in members:  # the scale is inside one of the GEMMs only
            parts["pre_quant_scale"].fill_(1.0)
        layer = nvfp4.linear(name.split()[0], kind, columns, outputs, members, drafter=True)
        for rows in (1, 5, 8, 9, 16, 20, 80, 128):
            x = torch.randn(rows, columns, device=DEVICE).bfloat16()
            with torch.inference_mode():
                ours = small_batch_layers.linear(layer, x)
                theirs = apply_fp4_marlin_linear(
                    x,
                    layer.weight,
                    layer.weight_scale,
                    layer.weight_global_scale,
                    layer.workspace,
                    sum(outputs),
                    columns,
                )
            worst = max(worst, relative(ours, theirs.float()))
            if rows <= 16 and not REHEARSAL:
                worst = max(worst, *_of_few_rows(layer, x, theirs))
    measured(worst=round(worst, 5))
    assert worst < 0.005


def _of_few_rows(layer: Any, x: torch.Tensor, wanted: torch.Tensor) -> list[float]:
    """Errors of the forms for such a batch, with an activation and without, also where another kernel was faster."""
    from vllm_gemma4_spec.kernels import small_batch_gemm

    n, (rows, k), errors = wanted.shape[1], x.shape, []
    for gelu in (False, True):
        form = small_batch_gemm.few_rows(n, k, gelu, rows)
        small_batch_gemm._compile([(form, gelu, False)])
        small_batch_gemm._make_room(n, k, {rows: form}, gelu, x.device)
        got = small_batch_gemm.gemm(x, layer.rows_codes, layer.rows_scales, layer.rows_global_scale, gelu, form=form)
        gate, up = wanted.float().chunk(2, dim=1)
        activated = torch.nn.functional.gelu(gate, approximate="tanh") * up
        errors.append(relative(got, activated if gelu else wanted.float()))
    return errors


def test_a_per_layer_input_is_what_three_kernels_give(cuda: None, measured: Any) -> None:
    """As one kernel, as two, and as larger batches have it; and which of them each batch gets."""
    from vllm_gemma4_spec.kernels import chosen_rows, gated_input

    wide, hidden, pair = gated_input.WIDE, 2560, []
    for seed, (name, columns, outputs) in enumerate((("gate", hidden, wide), ("projection", wide, hidden))):
        members = [nvfp4.tensors(outputs, columns, seed, 0)]
        layer = nvfp4.linear(f"per_layer_{name}", "merged", columns, [outputs], members, drafter=True)
        pair.append((layer, weights(members).T))
    (gate, gate_weight), (projection, up_weight) = pair
    assert gated_input.available()
    gated_input.register_operator()
    gated_input.choose(gate, projection)
    chosen = gated_input._chosen[hidden].copy()
    worst: dict[str, float] = {}
    try:
        for rows in (1, 5, 8, 9, 16, 20, 80, 128):
            generator = torch.Generator(device=DEVICE).manual_seed(rows)
            x = torch.randn(rows, hidden, generator=generator, device=DEVICE).bfloat16()
            by = torch.randn(rows, 3, wide, generator=generator, device=DEVICE).bfloat16()[:, 1]
            gated = torch.nn.functional.gelu((x.float() @ gate_weight).bfloat16().float(), approximate="tanh")
            truth = (gated * by.float()).bfloat16().float() @ up_weight
            for kernel in (chosen_rows.OTHER, gated_input.TWO, gated_input.ONE):
                gated_input._chosen[hidden] = {128: kernel}
                with torch.inference_mode():
                    y = torch.ops.vllm.gemma4_spec_per_layer_input(
                        x, by, *gated_input._weights(gate), *gated_input._weights(projection)
                    )
                worst[kernel] = max(worst.get(kernel, 0.0), relative(y, truth))
    finally:
        gated_input._chosen[hidden] = chosen
    measured(**{kernel.replace(" ", "_"): round(error, 5) for kernel, error in worst.items()}, chosen=str(chosen))
    assert max(worst.values()) < 0.02, worst


def test_experts(measured: Any) -> None:
    """A layer of 26B-A4B's 128 experts, as later ModelOpt versions export them, with NaN block scales."""
    from vllm.model_executor.layers.fused_moe import FusedMoE
    from vllm.utils.torch_utils import set_default_torch_dtype

    from vllm_gemma4_spec.quantization import Nvfp4Config

    count, top, hidden, inner = (8, 2, 256, 64) if REHEARSAL else (128, 8, 2816, 704)
    config = Nvfp4Config.from_config({"quant_algo": "NVFP4", "quant_method": "modelopt", "ignore": []})
    routed: dict[str, torch.Tensor] = {}
    with set_default_torch_dtype(torch.bfloat16), torch.device(DEVICE):
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
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    for expert in range(count):
        scale_2 = torch.tensor(6 * hidden**-0.5 / 2688 * (1 + expert / count), device=DEVICE)
        for shard, (rows, columns) in {"w1": (inner, hidden), "w3": (inner, hidden), "w2": (hidden, inner)}.items():
            weight = torch.randn(rows, columns, generator=generator, device=DEVICE) * columns**-0.5
            own = torch.tensor(6 * columns**-0.5 / 2688, device=DEVICE) if shard == "w2" else scale_2
            parts = nvfp4.packed(weight, own)
            codes = parts["weight_scale"].view(torch.uint8)
            codes[0, 1], codes[7, 3], codes[9, 0], codes[2, 0] = 0x7F, 0xFF, 0x7F, 0x01
            parts["weight"][9, :8] = 0x77
            truth[shard].append(nvfp4.decoded(parts))
            swapped[shard].append(nvfp4.decoded(parts, swapped=True))
            for suffix, value in parts.items():
                name = f"{'w2' if shard == 'w2' else 'w13'}_{suffix}"
                param = getattr(layer, name)
                param.weight_loader(param, value.clone(), f"experts.{name}", shard_id=shard, expert_id=expert)
    layer.quant_method.process_weights_after_loading(layer)
    assert sum(n for n, _ in layer.modelopt_nan.values()) == 9 * count

    def reference(w: dict[str, list[torch.Tensor]], x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(x.shape, device=DEVICE)
        for token, (ids, shares) in enumerate(zip(routed["ids"].tolist(), routed["weights"], strict=True)):
            for expert, share in zip(ids, shares, strict=True):
                one = x[token].float()
                gate = torch.nn.functional.gelu(w["w1"][expert] @ one, approximate="tanh")
                out[token] += share * (w["w2"][expert] @ (gate * (w["w3"][expert] @ one)))
        return out

    worst, nearest = 0.0, float("inf")
    for tokens in (1, 4, 16, 64):
        x = torch.randn(tokens, hidden, generator=generator, device=DEVICE).bfloat16()
        logits = torch.randn(tokens, count, generator=generator, device=DEVICE, dtype=torch.float32)
        chosen = torch.topk(logits.softmax(-1), top)
        routed["weights"] = chosen.values / chosen.values.sum(-1, keepdim=True)
        routed["ids"] = chosen.indices.int()
        with torch.inference_mode():
            if layer.quant_method.is_monolithic:
                y = layer.quant_method.apply_monolithic(layer, x, logits)
            else:
                y = layer.quant_method.apply(layer, x, routed["weights"], routed["ids"], None)
        right = reference(truth, x)
        worst, nearest = max(worst, relative(y, right)), min(nearest, relative(reference(swapped, x), right))
    measured(error=round(worst, 5), nearest_mistake=round(nearest, 4))
    assert worst < 0.03
    assert nearest > 5 * worst
