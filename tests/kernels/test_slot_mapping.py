"""The Triton slot kernel against the PyTorch form that the CPU runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.fresh import interpreted
from vllm_gemma4_spec.kernels import slot_mapping
from vllm_gemma4_spec.spec_decode.slot_mapping import PADDING_SLOT_ID, group_slot_mappings

BLOCK_SIZES = [16, 32, 64, 128, 16, 48]
MAX_LEN = 2048


def case(seed: int, query_lens: list[int], live: int | None = None) -> dict[str, Any]:
    """Requests at random places, a third of their tokens without a slot in the primary group."""
    generator = torch.Generator().manual_seed(seed)
    tables = [
        torch.randint(1, 5000, (8, -(-MAX_LEN // size)), generator=generator, dtype=torch.int32) for size in BLOCK_SIZES
    ]
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    num_tokens = int(starts[-1])
    positions = torch.cat(
        [torch.arange(n) + int(torch.randint(0, MAX_LEN - n + 1, (1,), generator=generator)) for n in query_lens]
    )
    primary = torch.randint(0, 10**6, (num_tokens,), generator=generator)
    primary[torch.rand(num_tokens, generator=generator) < 0.33] = PADDING_SLOT_ID
    # A rejected position may lie past the maximum length.
    positions[primary < 0] += MAX_LEN // 2
    return {
        "tables": tables,
        "block_sizes": BLOCK_SIZES,
        "query_start_loc": starts,
        "positions": positions,
        "primary_slots": primary,
        "out": torch.empty(len(BLOCK_SIZES), num_tokens + 5, dtype=torch.int64),
        "live": live,
    }


def expected(case: dict[str, Any]) -> torch.Tensor:
    out = torch.full_like(case["out"], -7)
    starts, num_tokens = case["query_start_loc"], len(case["positions"])
    num_reqs = len(starts) - 1
    primary = case["primary_slots"].clone()
    if case["live"] is not None:
        primary[starts[case["live"]] :] = PADDING_SLOT_ID
    arange = torch.arange(num_tokens, dtype=torch.int32)
    tables = [t[:num_reqs] for t in case["tables"]]
    group_slot_mappings(tables, BLOCK_SIZES, case["positions"], starts[1:], arange, primary, out)
    return out


CASES = {
    "one decode": case(0, [5]),
    "decodes": case(1, [5] * 8),
    "further pass": case(2, [1] * 8),
    "prompts and decodes": case(3, [200, 5, 1, 65, 64]),
    "padding of a graph": case(4, [5] * 8, live=3),
    "nothing live": case(5, [5] * 4, live=0),
}


def first_pass(seed: int, query_lens: list[int], added: int, longest: int) -> dict[str, Any]:
    """Of a draft's first pass: what the target verified, so many tokens a request more, a third of them rejected."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    places = [n + added for n in query_lens]
    return {
        "table": torch.randint(1, 5000, (len(places), MAX_LEN // 16), generator=generator, dtype=torch.int32),
        "starts": starts,
        "positions": torch.cat(
            [torch.arange(n) + int(torch.randint(0, MAX_LEN - n + 1, (1,), generator=generator)) for n in places]
        ),
        "rejected": torch.rand(sum(places), generator=generator) < 0.33,
        "added": added,
        "block_size": 16,
        "longest": longest,
    }


FIRST_PASSES = [
    first_pass(6, [4], 1, MAX_LEN),
    first_pass(7, [4] * 8, 1, MAX_LEN // 2),  # some past the maximum length
    first_pass(8, [200, 5, 1, 64], 3, MAX_LEN),
]


def step(seed: int, query_lens: list[int], longest: int) -> dict[str, Any]:
    """A step of the target: requests at random places, every token with a slot."""
    made = case(seed, query_lens)
    made["positions"] %= MAX_LEN
    return {key: made[key] for key in ("tables", "block_sizes", "query_start_loc", "positions")} | {
        "longest": longest,
        "length": MAX_LEN,
    }


STEPS = [step(9, [4], 64), step(10, [1] * 8, 2500), step(11, [200, 5, 1, 65, 64], 335)]  # the last leaves nothing over
STEPS.append(STEPS[1] | {"query_start_loc": torch.zeros(1, dtype=torch.int32)})  # no request, as a start maps it


@pytest.fixture(scope="module")
def by_triton(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    folder = tmp_path_factory.mktemp("slots")
    torch.save([*CASES.values(), *FIRST_PASSES, *STEPS], folder / "cases.pt")
    interpreted("tests.kernels.slot_mapping_by_triton", folder / "cases.pt", folder / "results.pt")
    names = [*CASES, *range(len(FIRST_PASSES)), *(f"step {i}" for i in range(len(STEPS)))]
    return dict(zip(names, torch.load(folder / "results.pt"), strict=True))


@pytest.mark.parametrize("name", list(CASES))
def test_kernel_writes_what_pytorch_writes(name: str, by_triton: dict[Any, Any]) -> None:
    wanted = expected(CASES[name])
    assert torch.equal(by_triton[name], wanted)
    live = CASES[name]["live"]
    assert bool((wanted[:, : len(CASES[name]["positions"])] >= 0).any()) == (live != 0)


@pytest.mark.parametrize("number", range(len(FIRST_PASSES)))
def test_a_first_passs_slots_are_vllms(number: int, by_triton: dict[Any, Any]) -> None:
    theirs, ours = by_triton[number]
    assert theirs.dtype == ours.dtype
    assert torch.equal(theirs, ours)
    assert bool((ours >= 0).any())
    assert bool((ours < 0).any())


@pytest.mark.parametrize("number", range(len(STEPS)))
def test_a_steps_slots_are_vllms(number: int, by_triton: dict[Any, Any]) -> None:
    theirs, ours = by_triton[f"step {number}"]
    assert torch.equal(theirs, ours)
    num_tokens, requests = len(STEPS[number]["positions"]), len(STEPS[number]["query_start_loc"]) - 1
    assert bool((ours[:, :num_tokens] > 0).all()) == bool(requests)
    assert bool((ours[:, num_tokens:] == PADDING_SLOT_ID).all())


def test_attention_may_read_metadata_before_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last kernel of the metadata's update starts when all before has ended: it is not launched early."""
    launched: list[dict[str, Any]] = []

    class Kernel:
        def __getitem__(self, _: Any) -> Any:
            return lambda *_, **more: launched.append(more)

    monkeypatch.setattr(slot_mapping, "_group_slot_mapping_kernel", Kernel())
    out = torch.empty(1, 4, dtype=torch.int64)
    kernel = slot_mapping.GroupSlotKernel([16], out)
    kernel.bind([torch.zeros(1, 4, dtype=torch.int32)])
    kernel(torch.tensor([0, 1], dtype=torch.int32), 1, torch.zeros(1, dtype=torch.int64), out[0])
    assert launched == [{"pad": -1, "block": slot_mapping.BLOCK}]  # no launch_pdl
