"""Steps of a batch, for kernels beside vLLM's own: what greedy steps sample from, block tables, computed tokens."""

from __future__ import annotations

import inspect
import itertools
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from tests.support.configs import vllm_config

MOST = 6  # requests of a batch of block tables
MOST_DRAFTS = 17
MOST_COUNTED = 20  # requests of a batch of counts


def tables(groups: int = 2) -> Any:
    """A ``MultiGroupBlockTable`` of two requests, on the host."""
    from vllm.v1.worker.block_table import MultiGroupBlockTable

    sizes = [16] * groups
    return MultiGroupBlockTable(2, 64, 8, False, torch.device("cpu"), sizes, sizes)


def reinitialize(wrapper: Callable[[Any], Any], together: Any, device: str, target: Any) -> None:
    """Calls ``GPUModelRunner.may_reinitialize_input_batch`` in a wrapper, of a runner that gets such tables."""
    runner = SimpleNamespace(device=torch.device(device), vllm_config=vllm_config(target, target))

    def original(self: Any) -> None:
        self.input_batch = SimpleNamespace(block_table=together)

    wrapper(original)(runner)


def greedy(**changed: Any) -> Any:
    """``SamplingMetadata`` of greedy requests that ask for nothing else."""
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata

    none = torch.zeros(0)
    values: dict[str, Any] = {
        "temperature": None,
        "all_greedy": True,
        "all_random": False,
        "top_p": None,
        "top_k": None,
        "generators": {},
        "max_num_logprobs": None,
        "no_penalties": True,
        "prompt_token_ids": None,
        "frequency_penalties": none,
        "presence_penalties": none,
        "repetition_penalties": none,
        "output_token_ids": [],
        "allowed_token_ids_mask": None,
        "bad_words_token_ids": {},
        "logitsprocs": LogitsProcessors(),
    }
    return SamplingMetadata(**values | changed)


def drafted(drafts: list[list[int]], device: str = "cpu") -> Any:
    """``SpecDecodeMetadata`` of requests with these drafts, a request's rows one after the other."""
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

    made = SpecDecodeMetadata.make_dummy(drafts, torch.device(device))
    ends = torch.tensor([len(d) + 1 for d in drafts]).cumsum(0)
    made.bonus_logits_indices = (ends - 1).to(device, torch.int32)
    bonus = set((ends - 1).tolist())
    rows = [row for row in range(int(ends[-1])) if row not in bonus]
    made.target_logits_indices = torch.tensor(rows, dtype=torch.int32, device=device)
    return made


def greedy_steps(vocab: int, device: str = "cpu", seeds: int = 6) -> Iterator[tuple[Any, torch.Tensor]]:
    """Drafts, many of them right, some absent; logits: equal ones, NaN, infinities, both zeros, none but -inf."""
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        draw = random.Random(seed)
        counts = [draw.choice([0, 1, 3, 3, 3, 7, MOST_DRAFTS]) for _ in range(draw.randint(1, 9))]
        rows = sum(counts) + len(counts)
        logits = torch.randn(rows, vocab, generator=generator).to(
            (torch.bfloat16, torch.float32, torch.float16)[seed % 3]
        )
        for row in range(rows):
            kind = draw.randrange(8)
            at = torch.randint(0, vocab, (5,), generator=generator)
            if kind == 0:
                logits[row, at] = 9.0  # the first of equals
            elif kind == 1:
                logits[row, at[:2]] = torch.nan
                logits[row, at[2]] = torch.inf
            elif kind == 2:
                logits[row] = -torch.inf
            elif kind == 3:
                logits[row] = -1.0
                logits[row, at[0]], logits[row, at[1]] = -0.0, 0.0
            elif kind == 4:
                logits[row, at] = torch.inf
            elif kind == 5:
                logits[row, -1] = 50.0
        largest = logits.float().argmax(-1).tolist()
        drafts, row = [], 0
        for count in counts:
            # -1 is a draft that a grammar has refused.
            others = [draw.randrange(-1, vocab) for _ in range(count)]
            drafts.append([largest[row + i] if draw.random() < 0.7 else others[i] for i in range(count)])
            row += count + 1
        # vLLM cuts off a vocabulary's padding.
        padded = torch.zeros(rows, vocab + 16, dtype=logits.dtype, device=device)
        padded[:, :vocab].copy_(logits)
        yield drafted(drafts, device), padded[:, :vocab]


def wrong_greedy_steps(vocab: int, device: str = "cpu", seeds: int = 6) -> list[str]:
    """Where our kernels and vLLM's samplers differ; and ``vLLM itself`` if nothing was accepted or rejected."""
    from vllm.v1.sample.rejection_sampler import RejectionSampler
    from vllm.v1.sample.sampler import Sampler

    from vllm_gemma4_spec.kernels import greedy as kernels

    found, tokens = [], []
    for number, (metadata, logits) in enumerate(greedy_steps(vocab, device, seeds)):
        sampler = Sampler()
        plain = sampler(logits, greedy()).sampled_token_ids
        ours = kernels.tokens(logits).unsqueeze(-1)
        if ours.dtype != plain.dtype or not torch.equal(ours, plain):
            found.append(f"step {number}: {ours.tolist()} for {plain.tolist()}")
        theirs = RejectionSampler(sampler)(metadata, None, logits, greedy()).sampled_token_ids
        kept = kernels.verdict(metadata, logits, MOST_DRAFTS)
        if kept.dtype != theirs.dtype or not torch.equal(kept, theirs):
            found.append(f"step {number}: {kept.tolist()} for {theirs.tolist()}")
        tokens += theirs.flatten().tolist()
    return found if -1 in tokens and sum(t >= 0 for t in tokens) > seeds else [*found, "vLLM itself"]


def wrong_copies(device: str, clean: bool, steps: int, seed: int = 0) -> list[str]:
    """Steps after which rows on the device are not the host's, of requests that come, grow, go and change places."""
    from vllm.v1.worker.block_table import BlockTable, MultiGroupBlockTable

    from vllm_gemma4_spec.kernels.table_copies import TableCopies
    from vllm_gemma4_spec.spec_decode import block_tables

    draw = random.Random(seed)
    pinned = device != "cpu"
    together = MultiGroupBlockTable(MOST, 40_000, 64, pinned, torch.device(device), [16, 64, 64], [16, 32, 64])
    tables = together.block_tables
    add, move = BlockTable.add_row, BlockTable.move_row
    if clean:
        add, move = block_tables.add_row(add), block_tables.move_row(move)
        for table in tables:
            setattr(table, block_tables.CLEAN, True)
    copies = TableCopies(tables, clean=clean)

    def blocks() -> list[int]:
        return [draw.randrange(1, 5000) for _ in range(draw.choice([0, 1, 1, 3, 300]))]

    found: list[str] = []
    live = 0
    for step in range(steps):
        for _ in range(draw.randrange(3)):
            kind = draw.randrange(4)
            if kind == 0 and live < MOST:
                for table in tables:
                    add(table, blocks(), live)
                live += 1
            elif kind == 1 and live:
                gone = draw.randrange(live)
                live -= 1
                for table in tables:
                    table.clear_row(gone)
                    if gone != live:
                        move(table, live, gone)
            elif kind == 2 and live > 1:
                for table in tables:
                    table.swap_row(*draw.sample(range(live), 2))
            elif live:
                row = draw.randrange(live)
                for table in tables:
                    table.append_row(blocks()[:3], row)
        if not live:
            continue
        for table in tables:  # as sleep mode leaves them, and vLLM the rows behind a batch that is padded
            table.block_table.gpu.fill_(draw.choice([-1, 77]))
        copies(live)
        for group, table in enumerate(tables):
            on_device, here = table.block_table.gpu[:live].cpu(), table.block_table.cpu[:live]
            if not torch.equal(on_device, here):
                found.append(f"step {step}, group {group}")
            if not bool((table.block_table.gpu[live:] != 0).all()):
                found.append(f"step {step}, group {group}: rows behind the batch")
    return found


def count_steps(seeds: int = 4) -> Iterator[list[torch.Tensor]]:
    """What ``update_num_computed_tokens_for_batch_change`` is given, for 1 to 16 requests now and in the step before.

    Requests have changed places, gone and come; one had drafts or none, one's token was discarded. Counts reach to the
    ends of int32, where a sum wraps.
    """
    for number, before, seed in itertools.product(range(1, 17), range(1, 17), range(seeds)):
        generator = torch.Generator().manual_seed(seed * 1000 + number * 20 + before)

        def draw(low: int, high: int, count: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randint(low, high, (count,), generator=generator).int()

        places = torch.cat([torch.randperm(before, generator=generator), torch.full((number,), -1)])
        if seed % 2:  # also requests that stayed, and new ones among them
            places = places[torch.randperm(len(places), generator=generator)]
        largest = 2**31 if seed == 3 else 2000
        on_host = draw(-largest, largest, number)
        computed, accepted = draw(-largest, largest, MOST_COUNTED), draw(0, 9, number)
        drafts = draw(0, 4, MOST_COUNTED) * draw(0, 2, MOST_COUNTED)
        yield [computed, accepted, places[:number].contiguous(), draw(0, 9, before), drafts, on_host]


def wrong_counts(update: Callable[..., None], device: str = "cpu", seeds: int = 4) -> list[str]:
    """Steps after which one of the tensors is not as vLLM's own function leaves it; ``vLLM itself`` if it does nothing.

    ``update`` is given slices of larger buffers, as a runner has them.
    """
    from vllm.v1.spec_decode.utils import update_num_computed_tokens_for_batch_change as stock

    stock = inspect.unwrap(stock)  # what torch.compile was given
    found, changed = [], 0
    for given in count_steps(seeds):
        theirs = [t.clone() for t in given]
        stock(*theirs)
        buffers = [torch.full((MOST_COUNTED + 3,), 77, dtype=t.dtype, device=device) for t in given]
        ours = [b[: len(t)].copy_(t) for b, t in zip(buffers, given, strict=True)]
        update(*ours)
        if not all(torch.equal(a.cpu(), b) for a, b in zip(ours, theirs, strict=True)):
            found.append(f"{len(given[1])} requests, {len(given[3])} before")
        if not all(bool((b[len(t) :] == 77).all()) for b, t in zip(buffers, given, strict=True)):
            found.append(f"{len(given[1])} requests, {len(given[3])} before: behind a buffer")
        changed += not torch.equal(theirs[0][: len(given[5])], given[5])
    return found if changed > 100 * seeds else [*found, "vLLM itself"]
