"""Between two steps nothing is compiled while requests wait: what is launched there was compiled at start-up."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import vllm_gemma4_spec
from tests.support import arrivals, step_cases
from tests.support.configs import GEMMA4, LLAMA, vllm_config
from tests.support.engine import Prompt, engine
from tests.support.stock import modules_around, without
from vllm_gemma4_spec.kernels import computed_counts
from vllm_gemma4_spec.performance import compiled_at_start, step_slots
from vllm_gemma4_spec.performance.compiled_at_start import BY_KERNEL
from vllm_gemma4_spec.performance.patches import COMPILED_AT_START

K = 3


@pytest.fixture(autouse=True)
def patched() -> None:
    vllm_gemma4_spec.apply()


@contextlib.contextmanager
def compilations() -> Iterator[list[Any]]:
    """What torch.compile compiles, one entry each time that it begins; it has compiled nothing yet."""
    from torch._dynamo.callback import callback_handler

    found: list[Any] = []
    torch._dynamo.reset()  # forgets who is to be called, too
    note = callback_handler.register_start_callback(found.append)
    try:
        yield found
    finally:
        callback_handler.remove_start_callback(note)  # raises if somebody has removed it


class CorrectsCounts:
    """Makes a CPU's runner correct its counts before a step, as async scheduling does on a card.

    The host's numbers, which are right on a CPU, are kept from it for requests that had drafts.
    """

    def __init__(self, runner: Any) -> None:
        self.runner, self.corrected = runner, 0
        self.pairs: set[tuple[bool, bool]] = set()  # several requests now, and in the step before
        self._counts: torch.Tensor | None = None
        self._before: dict[str, tuple[int, int]] = {}  # request: its place in the step before, its drafts there
        self._prepare_inputs = runner._prepare_inputs
        self._next_tokens = runner.drafter.prepare_next_token_ids_padded
        runner._prepare_inputs, runner.drafter.prepare_next_token_ids_padded = self.prepare_inputs, self.next_tokens

    def next_tokens(self, *args: Any) -> Any:
        tokens, self._counts = self._next_tokens(*args)
        return tokens, self._counts

    def prepare_inputs(self, scheduled: Any, *args: Any) -> Any:
        runner, batch = self.runner, self.runner.input_batch
        places = {request: place for request, (place, _) in self._before.items()}
        runner.use_async_spec_decode, runner.valid_sampled_token_count_gpu = True, self._counts
        batch.prev_req_id_to_index = places
        runner.prev_num_draft_tokens.np.fill(0)
        for place, drafts in self._before.values():
            runner.prev_num_draft_tokens.np[place] = drafts
        right = batch.num_computed_tokens_cpu_tensor[: batch.num_reqs].clone()
        try:
            made = self._prepare_inputs(scheduled, *args)
        finally:
            runner.use_async_spec_decode, batch.prev_req_id_to_index = False, None
        assert runner.num_computed_tokens[: batch.num_reqs].tolist() == right.tolist()
        if self._counts is not None and places:
            self.pairs.add((batch.num_reqs > 1, len(self._counts) > 1))
            self.corrected += sum(drafts > 0 for _, drafts in self._before.values())
        drafts = scheduled.scheduled_spec_decode_tokens
        self._before = {r: (place, len(drafts.get(r, ()))) for place, r in enumerate(batch.req_ids)}
        return made


def serve(models: dict[str, Path]) -> list[Prompt]:
    """Answers of an engine to requests that come and go."""
    with engine(models["target"], models["close"], K) as llm, torch.compiler.set_stance("default"):
        corrects = CorrectsCounts(llm.llm_engine.model_executor.driver_worker.worker.model_runner)
        answers = arrivals.serve(llm)
        del llm
    assert corrects.pairs == {(False, False), (False, True), (True, False), (True, True)}
    assert corrects.corrected > 20
    return answers


@pytest.fixture(scope="module")
def stock(tiny: dict[str, Path]) -> tuple[list[Prompt], int]:
    """Without the patch: answers, and how often torch.compile compiled while requests waited."""
    with without(COMPILED_AT_START), compilations() as found:
        answers = serve(tiny)
    return answers, len(found)


def test_stock_compiles_while_requests_wait(stock: tuple[list[Prompt], int]) -> None:
    """For one and for several requests, now and in the step before."""
    assert stock[1] == 4


@pytest.fixture(scope="module")
def ours(tiny: dict[str, Path]) -> tuple[list[Prompt], int]:
    """The same with it."""
    vllm_gemma4_spec.apply()
    with compilations() as found:
        answers = serve(tiny)
    return answers, len(found)


def test_nothing_is_compiled_while_requests_wait(ours: tuple[list[Prompt], int]) -> None:
    assert ours[1] == 0


def test_answers_are_stocks(ours: tuple[list[Prompt], int], stock: tuple[list[Prompt], int]) -> None:
    assert ours[0] == stock[0]


class OnCard(torch.Tensor):
    """A tensor that says it is on a GPU, and so does all that is made of it."""

    is_cuda = True


def runner(target: Any = GEMMA4, on_card: bool = True, speculates: bool = True, most: int = 40, **spec: Any) -> Any:
    """What the wrappers read of a ``GPUModelRunner``, with vLLM's own methods for its drafter; by its start's steps."""
    from vllm.v1.spec_decode.eagle import SpecDecodeBaseProposer as Proposer
    from vllm.v1.utils import CpuGpuBuffer

    def buffer(dtype: torch.dtype = torch.int32) -> Any:
        return CpuGpuBuffer(most, dtype=dtype, device=torch.device("cpu"), pin_memory=False)

    drafter = SimpleNamespace(backup_next_token_ids=buffer())
    for name in ("prepare_next_token_ids_padded", "prepare_inputs_padded"):
        setattr(drafter, name, MethodType(getattr(Proposer, name), drafter))
    config = vllm_config(target, target)
    if not speculates:
        config.speculative_config = None
    computed = torch.arange(most, dtype=torch.int32)
    made = SimpleNamespace(
        vllm_config=config,
        device=torch.device("cpu"),
        drafter=drafter,
        speculative_config=SimpleNamespace(
            disable_padded_drafter_batch=spec.get("unpadded", False),
            use_eagle=lambda: spec.get("method", "eagle") == "eagle",
            uses_draft_model=lambda: spec.get("method") == "draft_model",
        ),
        max_num_reqs=most,
        use_async_spec_decode=spec.get("asynchronous", True),
        num_spec_tokens=spec.get("k", K),
        input_batch=SimpleNamespace(vocab_size=512, block_table=SimpleNamespace()),
        num_computed_tokens=computed.as_subclass(OnCard) if on_card else computed,
        prev_num_draft_tokens=buffer(),
        num_accepted_tokens=buffer(),
        prev_positions=buffer(torch.int64),
    )
    compiled_at_start.may_reinitialize_input_batch(lambda self: None)(made)
    return made


class Launches:
    """In the place of a kernel of vLLM's: the forms in which it would be compiled."""

    def __init__(self, numbers: tuple[int, ...], block: str | None = None) -> None:
        self.numbers, self.block = numbers, block
        self.forms: set[Any] = set()

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*args: Any, **constants: int) -> None:
            # Triton 3.6: a number that is 1 is a constant, one that 16 divides is known as such, and so is an address.
            kinds = tuple((args[n] == 1, args[n] % 16 == 0) for n in self.numbers)
            tensors = tuple((a.dtype, a.data_ptr() % 16) for a in args if isinstance(a, torch.Tensor))
            self.forms.add((kinds, constants.get(self.block or ""), tensors))

        return launch


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], Launches, Launches]:
    """Corrections of counts by the kernel; forms of the kernels that prepare a draft."""
    from vllm.v1.spec_decode import eagle

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # without a driver it raises
    corrections: list[Any] = []
    monkeypatch.setattr(computed_counts, "update", lambda *args: corrections.append(args))
    tokens, inputs = Launches((5, 6, 7, 8), "BLOCK_SIZE_TOKENS"), Launches((5,))
    monkeypatch.setattr(eagle, "eagle_prepare_next_token_padded_kernel", tokens)
    monkeypatch.setattr(eagle, "eagle_prepare_inputs_padded_kernel", inputs)
    return corrections, tokens, inputs


def sample(of: Any) -> Any:
    return compiled_at_start.dummy_sampler_run(lambda self, hidden: hidden)(of, "sampled")


def step(of: Any, num_reqs: int, num_tokens: int) -> None:
    """What a step of such a batch launches between sampling and the draft, as vLLM's runner does."""
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

    request = SimpleNamespace(get_token_id=lambda at: 0)
    batch = SimpleNamespace(
        num_reqs=num_reqs,
        num_tokens_no_spec=np.ones(of.max_num_reqs, dtype=np.int32),
        req_ids=[""] * num_reqs,
        vocab_size=of.input_batch.vocab_size,
    )
    sampled = torch.full((num_reqs, num_tokens), -1, dtype=torch.int32)
    discard = torch.zeros(of.max_num_reqs, dtype=torch.bool)
    _, counts = of.drafter.prepare_next_token_ids_padded(sampled, {"": request}, batch, discard)
    starts = torch.arange(of.max_num_reqs + 1, dtype=torch.int32)
    metadata = SpecDecodeMetadata.make_dummy([[0]] * num_reqs, of.device)
    common = CommonAttentionMetadata(
        query_start_loc=starts[: num_reqs + 1],
        query_start_loc_cpu=starts[: num_reqs + 1],
        seq_lens=counts,
        num_reqs=num_reqs,
        num_actual_tokens=num_reqs,
        max_query_len=1,
        max_seq_len=1,
        block_table_tensor=torch.zeros(num_reqs, 1, dtype=torch.int32),
        slot_mapping=torch.zeros(num_reqs, dtype=torch.int64),
    )
    of.drafter.prepare_inputs_padded(common, metadata, counts)


@pytest.mark.parametrize("method", ["eagle", "draft_model"])
@pytest.mark.parametrize(("most", "k"), [(1, 3), (4, 3), (40, 3), (40, 1), (40, 16)])
def test_a_start_launches_every_form(
    kernels: Any, most: int, k: int, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    corrections, tokens, inputs = kernels
    of = runner(most=most, k=k, method=method)
    with caplog.at_level(logging.INFO, "vllm.plugins.gemma4_spec"):
        assert sample(of) == "sampled"
    assert not caplog.messages  # nor a batch that is larger than any
    assert len(corrections) == 1
    at_start = set(tokens.forms), set(inputs.forms)
    for num_reqs in range(1, most + 1):
        for num_tokens in range(1, k + 2):
            step(of, num_reqs, num_tokens)
    assert (tokens.forms, inputs.forms) == at_start


def test_what_serving_uses_stays(kernels: Any) -> None:
    """A start's corrections are of tensors of their own, of the shapes and dtypes of a runner's."""
    of = runner()
    before = of.num_computed_tokens.clone()
    sample(of)
    (given,) = kernels[0]
    own = [of.num_computed_tokens, *(b.gpu for b in (of.num_accepted_tokens, of.prev_positions))]
    own += [of.num_accepted_tokens.gpu, of.prev_num_draft_tokens.gpu, of.num_computed_tokens]
    assert [t.dtype for t in given] == [t.dtype for t in own]
    assert [len(t) for t in given] == [40, 1, 1, 1, 40, 1]
    assert not {t.data_ptr() for t in given} & {t.data_ptr() for t in own}
    assert not any(bool(t.any()) for t in given)
    assert torch.equal(of.num_computed_tokens, before)
    assert of.max_num_reqs == len(of.num_computed_tokens)


@pytest.mark.parametrize("spec", [{"unpadded": True}, {"method": "ngram_gpu"}], ids=str)
def test_other_drafters_have_no_such_kernels(kernels: Any, spec: dict[str, Any]) -> None:
    corrections, tokens, inputs = kernels
    sample(runner(**spec))
    assert len(corrections) == 1
    assert not tokens.forms
    assert not inputs.forms


@pytest.mark.parametrize("case", [{"target": LLAMA}, {"on_card": False}, {"speculates": False}], ids=lambda c: str(*c))
def test_elsewhere_a_start_launches_nothing(kernels: Any, case: dict[str, Any]) -> None:
    corrections, tokens, _ = kernels
    assert sample(runner(**case)) == "sampled"
    assert not corrections
    assert not tokens.forms


@pytest.mark.parametrize("fails", [False, True])
def test_slots_of_a_step_are_mapped_for_no_request(kernels: Any, fails: bool, caplog: pytest.LogCaptureFixture) -> None:
    of, mapped = runner(), []

    def slots(num_reqs: int, starts: torch.Tensor, positions: torch.Tensor) -> None:
        mapped.append((num_reqs, starts.dtype, positions.dtype))
        if fails:
            raise RuntimeError("no compiler")

    setattr(of.input_batch.block_table, step_slots.SLOTS, slots)
    with caplog.at_level(logging.INFO, "vllm.plugins.gemma4_spec"):
        assert sample(of) == "sampled"
    assert mapped == [(0, torch.int32, torch.int64)]
    assert [line for line in caplog.messages if "step's slots" in line] == caplog.messages
    assert len(caplog.messages) == fails


def test_counts_that_nothing_corrects_need_no_kernel(kernels: Any) -> None:
    sample(runner(asynchronous=False))
    assert not kernels[0]
    assert kernels[1].forms


def test_cards_of_others_keep_vllms_function(kernels: Any) -> None:
    of = SimpleNamespace(vllm_config=vllm_config(GEMMA4, GEMMA4), num_computed_tokens=torch.zeros(4, device="meta"))
    compiled_at_start.may_reinitialize_input_batch(lambda self: None)(of)
    assert not hasattr(of.num_computed_tokens, BY_KERNEL)


def test_nothing_is_launched_into_a_graph(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert sample(runner()) == "sampled"
    assert not kernels[0]


def test_a_start_does_without_the_kernel(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(computed_counts, "update", fails)
    of = runner()
    with caplog.at_level(logging.INFO, "vllm.plugins.gemma4_spec"):
        assert sample(of) == "sampled"
    (line,) = caplog.messages
    assert "no compiler" in line
    assert kernels[1].forms
    called: list[Any] = []
    corrected(called)(of.num_computed_tokens)
    assert called == ["plain"]


def test_a_start_does_without_the_drafters_kernels(kernels: Any, caplog: pytest.LogCaptureFixture) -> None:
    of = runner()
    del of.drafter.prepare_inputs_padded
    with caplog.at_level(logging.INFO, "vllm.plugins.gemma4_spec"):
        assert sample(of) == "sampled"
    (line,) = caplog.messages
    assert "prepare_inputs_padded" in line
    assert getattr(of.num_computed_tokens, BY_KERNEL)


def corrected(called: list[str], given: str = "_torchdynamo_orig_callable") -> Callable[..., None]:
    """The wrapper around a function of torch.compile that keeps what it was given under such a name."""

    def plain(*_: Any, **__: Any) -> None:
        called.append("plain")

    @functools.wraps(plain)
    def compiled(*_: Any, **__: Any) -> None:
        called.append("compiled")

    setattr(compiled, given, plain)
    return compiled_at_start.update_num_computed_tokens(compiled)


def test_each_engine_has_its_form(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(computed_counts, "update", lambda *_: called.append("kernel"))
    correct = corrected(called)
    for case in ({}, {"on_card": False}, {"target": LLAMA}, {"speculates": False}):
        correct(runner(**case).num_computed_tokens)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    correct(runner().num_computed_tokens)
    assert called == ["kernel", "plain", "compiled", "compiled", "plain"]


def test_where_torch_hides_the_function_the_log_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    called: list[str] = []
    correct = corrected(called, "_another_name")
    compiled_at_start._say_that_it_stays.cache_clear()
    with caplog.at_level(logging.INFO, "vllm.plugins.gemma4_spec"):
        for _ in range(2):
            correct(runner(on_card=False).num_computed_tokens)
        assert len(caplog.messages) == 1
    assert called == ["compiled", "compiled"]


def test_with_torch_compile_off_there_is_nothing_to_say(caplog: pytest.LogCaptureFixture) -> None:
    called: list[Any] = []
    correct = compiled_at_start.update_num_computed_tokens(called.append)
    compiled_at_start._say_that_it_stays.cache_clear()
    with caplog.at_level(logging.INFO, "vllm.plugins.gemma4_spec"):
        correct(of := runner(on_card=False).num_computed_tokens)
    assert called[0] is of
    assert not caplog.messages


def test_this_torch_hands_out_the_function() -> None:
    from vllm.v1.spec_decode.utils import update_num_computed_tokens_for_batch_change as stock

    assert getattr(stock, compiled_at_start._GIVEN) is inspect.unwrap(stock)


def test_every_count_is_vllms() -> None:
    """By what stands in the runner's module on a CPU."""
    from vllm.v1.worker.gpu_model_runner import update_num_computed_tokens_for_batch_change as correct

    def update(computed: torch.Tensor, *args: torch.Tensor) -> None:
        setattr(computed, BY_KERNEL, False)
        correct(computed, *args)

    with compilations() as found:
        assert step_cases.wrong_counts(update) == []
    assert not found


def test_the_runners_methods_are_wrapped() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    for method in (GPUModelRunner.may_reinitialize_input_batch, GPUModelRunner._dummy_sampler_run):
        assert "vllm_gemma4_spec.performance.compiled_at_start" in modules_around(method)
