"""Every PyTorch form gives what vLLM's Triton kernel gives in Triton's interpreter, bit for bit."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections import defaultdict
from pathlib import Path
from typing import Any

import kernel_cases
import pytest
import torch

from tests.support.fresh import interpreted
from vllm_gemma4_spec.cpu import draft_kernels, rejection_kernels
from vllm_gemma4_spec.cpu.launch import CpuKernel
from vllm_gemma4_spec.cpu.patches import CPU_KERNELS
from vllm_gemma4_spec.registry import PATCHER

FEWEST = 60
CASES_PER_KERNEL = [FEWEST, pytest.param(400, marks=pytest.mark.slow)]
FORMS: dict[str, CpuKernel] = {
    f"{source}:{name}_kernel": form
    for source, module in ((kernel_cases.DRAFT, draft_kernels), (kernel_cases.REJECTION, rejection_kernels))
    for name, form in vars(module).items()
    if isinstance(form, CpuKernel)
}
Results = tuple[dict[str, list[tuple[kernel_cases.Case, kernel_cases.Case]]], dict[str, list[str]]]


@pytest.fixture(scope="module", params=CASES_PER_KERNEL)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """``{kernel: [(case before, case after the Triton kernel ran)]}`` and ``{kernel: its parameters}``."""
    folder: Path = tmp_path_factory.mktemp("triton")
    before = kernel_cases.make_cases(request.param, seed=1)
    torch.save(before, folder / "cases.pt")
    interpreted("tests.cpu.triton_reference", folder / "cases.pt", folder / "results.pt")
    loaded = torch.load(folder / "results.pt", weights_only=False)
    pairs = defaultdict(list)
    for case, after in zip(before, loaded["cases"], strict=True):
        pairs[case["kernel"]].append((case, after))
    return pairs, loaded["parameters"]


def storage(tensor: torch.Tensor) -> torch.Tensor:
    """All that a tensor's storage holds, what lies outside the tensor included."""
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())


def difference(case: kernel_cases.Case, after: kernel_cases.Case) -> str | None:
    """The first tensor of ``case`` that is not what it is in ``after``."""
    for name, have in case["args"].items():
        want: Any = after["args"][name]
        if isinstance(have, torch.Tensor) and not torch.equal(storage(have), storage(want)):
            return f"{name}: {have.tolist()}, Triton {want.tolist()}\n{case}"
    return None


@pytest.mark.parametrize("kernel", FORMS)
def test_same_as_triton(kernel: str, results: Results) -> None:
    pairs = results[0][kernel]
    assert len(pairs) >= FEWEST
    changed = 0
    for before, after in pairs:
        case = copy.deepcopy(before)
        FORMS[kernel][case["grid"]](*case["args"].values())
        assert difference(case, after) is None
        changed += difference(before, after) is not None
    assert changed > 0.8 * len(pairs)  # the Triton kernel did run on the cases


@pytest.mark.parametrize("kernel", FORMS)
def test_same_parameters(kernel: str, results: Results) -> None:
    """Positional launches rely on the order, keyword launches on the names."""
    names = [name.removesuffix("_ptr") for name in results[1][kernel]]
    assert list(inspect.signature(FORMS[kernel].form).parameters) == ["grid", *names]


@pytest.mark.parametrize("kernel", FORMS)
def test_keyword_launch(kernel: str, results: Results) -> None:
    before, after = results[0][kernel][0]
    case = copy.deepcopy(before)
    FORMS[kernel][case["grid"]](**case["args"])
    assert difference(case, after) is None


def test_a_column_of_draft_ids_is_as_good_as_a_row(results: Results) -> None:
    """The kernel counts elements; vLLM's own test of it passes ``[T, 1]``."""
    kernel = next(k for k in FORMS if k.endswith(":sample_recovered_tokens_kernel"))
    for before, after in results[0][kernel]:
        case = copy.deepcopy(before)
        args = case["args"]
        names = [n for n in args if n.startswith(("output_token_ids", "draft_token_ids"))]
        assert len(names) == 2
        args |= {n: args[n].unsqueeze(1) for n in names}
        FORMS[kernel][case["grid"]](*args.values())
        args |= {n: args[n].squeeze(1) for n in names}
        assert difference(case, after) is None


def test_stock_cpu_slot_mapping(results: Results) -> None:
    """0.19.1's own CPU form (C++) does what the Triton kernel does, except that it leaves the padding as it is."""
    from vllm.platforms import current_platform
    from vllm.utils.cpu_triton_utils import compute_slot_mapping_kernel

    current_platform.import_kernels()
    for before, after in results[0]["vllm.v1.worker.block_table:_compute_slot_mapping_kernel"]:
        case = copy.deepcopy(before)
        compute_slot_mapping_kernel[case["grid"]](*case["args"].values())
        tokens = case["args"]["num_tokens"]
        have, want = (c["args"]["slot_mapping_ptr"] for c in (case, after))
        assert torch.equal(have[:tokens], want[:tokens])
        assert torch.equal(have[tokens:], before["args"]["slot_mapping_ptr"][tokens:])


def test_vllm_launches_the_step_form(results: Results) -> None:
    """Through vLLM's own function, which computes the grid and the strides."""
    from vllm.v1.spec_decode import utils

    PATCHER.apply([CPU_KERNELS])
    try:
        for before, after in results[0][f"{kernel_cases.DRAFT}:eagle_step_slot_mapping_metadata_kernel"]:
            case = copy.deepcopy(before)
            args = case["args"]
            utils.eagle_step_update_slot_mapping_and_metadata(
                positions_1d=args["positions_ptr"],
                block_table_tensor=args["block_table_ptr"],
                seq_lens=args["seq_lens_ptr"],
                block_size=args["block_size"],
                max_model_len=args["max_model_len"],
                out_clamped_positions=args["out_clamped_positions_ptr"],
                out_slot_mapping=args["out_slot_mapping_ptr"],
                input_batch_size=case["grid"][0],
            )
            assert difference(case, after) is None
    finally:
        PATCHER.undo([CPU_KERNELS])


def test_cases_reach_the_corners() -> None:
    """What the kernels branch on occurs among the fewest cases that are run."""
    args = defaultdict(list)
    for case in kernel_cases.make_cases(FEWEST, seed=1):
        args[case["kernel"].partition(":")[2]].append(case["args"])
    steps = args["eagle_step_slot_mapping_metadata_kernel"]
    assert any((a["positions_ptr"] + 1 >= a["max_model_len"]).any() for a in steps)
    assert any(len(a["out_slot_mapping_ptr"]) > a["batch_size"] for a in steps)
    copies = args["copy_and_expand_eagle_inputs_kernel"]
    corners = {(a["shift_input_ids"], a["num_padding_slots_per_request"]) for a in copies}
    assert corners == {(shift, slots) for shift in (False, True) for slots in (1, 2, 3, 4)}
    assert any(len(a["draft_token_ids_ptr"]) == 0 for a in args["rejection_greedy_sample_kernel"])
    for name in ("rejection_random_sample_kernel", "sample_recovered_tokens_kernel"):
        assert any(a["NO_DRAFT_PROBS"] for a in args[name])
        assert any(not a["NO_DRAFT_PROBS"] for a in args[name])
        assert any((a["draft_token_ids_ptr"] == -1).any() for a in args[name])


def test_patch_covers_every_launched_kernel() -> None:
    """Each kernel that 0.19.1 launches in the modules of speculation has a form in its place, and back after undo."""
    modules = ("vllm.v1.spec_decode.utils", "vllm.v1.spec_decode.eagle", "vllm.v1.sample.rejection_sampler")
    launched = set()
    for name in modules:
        text = inspect.getsource(importlib.import_module(name))
        launched |= {f"{name}:{line.split('[')[0].strip()}" for line in text.splitlines() if "_kernel[" in line}
    assert len(launched) == 8
    originals = {target: _resolve(target) for target in launched}
    PATCHER.apply([CPU_KERNELS])
    try:
        PATCHER.apply([CPU_KERNELS])
        for target in launched:
            assert isinstance(_resolve(target), CpuKernel), target
    finally:
        PATCHER.undo([CPU_KERNELS])
    assert all(_resolve(target) is original for target, original in originals.items())


def _resolve(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def test_other_platforms_keep_their_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_gemma4_spec.cpu import launch

    monkeypatch.setattr(launch, "_platform_is_cpu", lambda: False)
    kernel = object()
    assert all(form.on_cpu(kernel) is kernel for form in FORMS.values())
    assert launch.without_triton(True) is True
