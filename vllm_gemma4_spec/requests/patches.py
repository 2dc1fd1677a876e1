"""Patches that keep a request's rules at every position of a step. What each field of a request does: ``fields.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_gemma4_spec.patching.patch import Edit, Group, Lazy, Patch

if TYPE_CHECKING:
    from vllm_gemma4_spec.requests import (
        allowed_tokens,
        min_tokens,
        responses_stream,
        stop_strings,
        structured_output,
        thinking_budget,
        validation,
    )
else:  # a wrapper's module is imported only after the module of vLLM that it patches
    allowed_tokens = Lazy("vllm_gemma4_spec.requests.allowed_tokens")
    min_tokens = Lazy("vllm_gemma4_spec.requests.min_tokens")
    responses_stream = Lazy("vllm_gemma4_spec.requests.responses_stream")
    stop_strings = Lazy("vllm_gemma4_spec.requests.stop_strings")
    structured_output = Lazy("vllm_gemma4_spec.requests.structured_output")
    thinking_budget = Lazy("vllm_gemma4_spec.requests.thinking_budget")
    validation = Lazy("vllm_gemma4_spec.requests.validation")

_MANAGER = "vllm.v1.structured_output:StructuredOutputManager"
_RUNNER = "vllm.v1.worker.gpu_model_runner"
_REJECTION = "vllm.v1.sample.rejection_sampler:RejectionSampler"
_OUTPUT = "vllm.v1.engine.output_processor:OutputProcessor"

GRAMMAR_POSITIONS = Patch(
    name="grammar-positions",
    group=Group.CORRECTNESS,
    why="vLLM looks for the end of reasoning in the last token of a step only. A `<channel|>` accepted as a draft is "
    "never seen: JSON schemas, choices, regexes, grammars and forced tool calls are ignored, with HTTP 200. Drafts "
    "behind it are not validated. And where the prompt leaves no channel to open the grammar never begins, with and "
    "without speculation.",
    how="A grammar is wrapped in one that knows where it begins and ends, so that filling bitmasks, validating drafts, "
    "advancing and rolling back may each reach across the end of reasoning or of the sequence. Whether there is a "
    "channel to wait for is read from each request's prompt.",
    retire="#44297 and #44993, once a release has both and looks at the prompt.",
    scope="Engines whose target is a Gemma 4; of their requests, those with a grammar.",
    related="#44297, #44993, #50938",
    edits=(
        Edit(f"{_MANAGER}.__init__", structured_output.manager_init),
        Edit(f"{_MANAGER}.grammar_init", structured_output.grammar_init),
        Edit(f"{_MANAGER}._create_grammar", structured_output.create_grammar),
    ),
    watches=(
        f"{_MANAGER}.grammar_bitmask",
        f"{_MANAGER}._fill_bitmasks",
        f"{_MANAGER}.should_fill_bitmask",
        f"{_MANAGER}.should_advance",
        "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
        "vllm.v1.core.sched.scheduler:Scheduler.update_draft_token_ids",
        "vllm.v1.core.sched.scheduler:Scheduler.update_draft_token_ids_in_output",
        "vllm.v1.structured_output.backend_types:StructuredOutputGrammar",
        "vllm.reasoning.gemma4_reasoning_parser:Gemma4ReasoningParser",
    ),
)

THINKING_BUDGET = Patch(
    name="thinking-budget",
    group=Group.CORRECTNESS,
    why="With speculation vLLM keeps min_tokens of its logits processors and no other: thinking_token_budget is "
    "ignored without a word. Without speculation the budget is counted by steps: with async scheduling the tokens of "
    "the last step are not known then, and chunks of a prompt and preemption move where reasoning is cut.",
    how="A processor that counts by tokens, read when logits are there, takes the place of vLLM's. With speculation it "
    "also goes through the drafts, so the end of reasoning is forced at its position, and after the last draft.",
    retire="A release whose rejection sampler applies the thinking budget to drafts.",
    scope="Engines whose target is a Gemma 4; of their requests, those with a thinking_token_budget.",
    related="none found",
    edits=(
        Edit(
            f"{_RUNNER}:build_logitsprocs",
            thinking_budget.build_logitsprocs,
            source="vllm.v1.sample.logits_processor:build_logitsprocs",
        ),
        Edit(f"{_REJECTION}.forward", thinking_budget.forward),
        Edit(f"{_REJECTION}.apply_logits_processors", thinking_budget.apply_logits_processors),
    ),
    watches=(
        "vllm.v1.sample.logits_processor.builtin:ThinkingTokenBudgetLogitsProcessor",
        "vllm.v1.sample.logits_processor.builtin:process_dict_updates",
        "vllm.v1.worker.gpu_input_batch:InputBatch.update_async_output_token_ids",
        "vllm.v1.worker.gpu_input_batch:InputBatch.update_async_spec_token_ids",
        f"{_RUNNER}:GPUModelRunner._sample",
    ),
)

MIN_TOKENS = Patch(
    name="min-tokens",
    group=Group.CORRECTNESS,
    why="After the last draft of a step vLLM still forbids the end of the answer where min_tokens was not reached at "
    "the step's beginning, though the drafts have reached it: the answer goes on past its end. With async scheduling "
    "it also counts drafts of the step before that were rejected: the answer ends too early.",
    how="The processor counts the drafts of a step before the token after them, and outputs only once it is known what "
    "was accepted.",
    retire="A release whose rejection sampler counts the drafts for the token after them, and no rejected ones.",
    scope="Engines whose target is a Gemma 4 and that speculate; of their requests, those with min_tokens.",
    related="none found",
    edits=(
        Edit(
            f"{_RUNNER}:build_logitsprocs",
            min_tokens.build_logitsprocs,
            source="vllm.v1.sample.logits_processor:build_logitsprocs",
        ),
        Edit(f"{_REJECTION}.forward", min_tokens.forward),
        Edit("vllm.v1.worker.gpu_input_batch:InputBatch._make_sampling_metadata", min_tokens.make_sampling_metadata),
    ),
    watches=(
        "vllm.v1.sample.logits_processor.builtin:MinTokensLogitsProcessor",
        "vllm.v1.sample.logits_processor.builtin:process_dict_updates",
        "vllm.v1.worker.gpu_input_batch:InputBatch.update_async_output_token_ids",
    ),
)

ALLOWED_TOKENS = Patch(
    name="allowed-tokens",
    group=Group.CORRECTNESS,
    why="When a request moves to another row of the batch, its allowed_token_ids stay behind for the next one in its "
    "old row, and where two rows are swapped one request's replace the other's: answers avoid tokens that they may "
    "have, or break their grammar (HTTP 200).",
    how="A row is cleared for a request without allowed ids, and of two rows that are swapped each gets the other's.",
    retire="#43931 and #48419, once a release has both.",
    scope="Engines whose target or drafter is a Gemma 4, while one of their requests has allowed_token_ids.",
    related="#43894, #43931, #48419",
    edits=(
        Edit(f"{_RUNNER}:GPUModelRunner._update_states", allowed_tokens.update_states),
        Edit("vllm.v1.worker.gpu_input_batch:InputBatch.add_request", allowed_tokens.add_request),
        Edit("vllm.v1.worker.gpu_input_batch:InputBatch.swap_states", allowed_tokens.swap_states),
    ),
    watches=("vllm.v1.worker.gpu_input_batch:InputBatch.condense",),
)

STOP_STRINGS = Patch(
    name="stop-strings",
    group=Group.CORRECTNESS,
    why="Of several stop strings in a step's text vLLM takes the first of the request, not the first in the text, and "
    "the tokens that a step has after it stay in the answer's token ids, log-probabilities and usage.",
    how="Answers with stop strings are looked at token by token: the string that ends first ends the answer, and what "
    "the step has after that token is dropped. Answers without stop strings take vLLM's way.",
    retire="A release that cuts a step's tokens at the stop string that ends first.",
    scope="Engines whose target is a Gemma 4; of their requests, those with stop strings.",
    related="none found",
    edits=(
        Edit("vllm.v1.engine.llm_engine:LLMEngine.__init__", stop_strings.engine_init),
        Edit("vllm.v1.engine.async_llm:AsyncLLM.__init__", stop_strings.engine_init),
        Edit(f"{_OUTPUT}.add_request", stop_strings.add_request),
    ),
    watches=(
        f"{_OUTPUT}.process_outputs",
        "vllm.v1.engine.detokenizer:BaseIncrementalDetokenizer.update",
        "vllm.v1.engine.detokenizer:check_stop_strings",
        "vllm.v1.engine.logprobs:LogprobsProcessor.update_from_output",
    ),
)

RESPONSES_SCHEMA = Patch(
    name="responses-schema",
    group=Group.CORRECTNESS,
    why="A streamed `/v1/responses` whose text has a JSON schema dies before its first event, and a forced tool choice "
    "is such a schema: ResponseCreatedEvent does not take the format as vLLM writes it.",
    how="The stream is made without the format, which then goes into each event's response as the object that it is.",
    retire="A release that writes the response of an event by alias.",
    scope="Servers of a Gemma 4.",
    related="none found",
    edits=(
        Edit(
            "vllm.entrypoints.openai.responses.serving:OpenAIServingResponses.responses_stream_generator",
            responses_stream.responses_stream_generator,
        ),
    ),
    watches=("vllm.tool_parsers.abstract_tool_parser:ToolParser.adjust_request",),
)

REQUEST_ERRORS = Patch(
    name="request-errors",
    group=Group.CONVENIENCE,
    why="A grammar that does not compile, or a budget without --reasoning-config, is refused without naming the field "
    "as `param`, and in a stream only after HTTP 200. A negative thinking_token_budget is accepted.",
    how="What the frontend's check raises gets the field; requests that it may refuse are checked before their stream "
    "is made. A negative budget is refused.",
    retire="A release that names the field in every error, before the stream.",
    scope="Engines whose target is a Gemma 4.",
    related="none found",
    edits=(
        Edit("vllm.sampling_params:SamplingParams.verify", validation.verify),
        Edit("vllm.v1.engine.input_processor:InputProcessor._validate_params", validation.validate_params),
        Edit("vllm.v1.engine.async_llm:AsyncLLM.generate", validation.generate),
        Edit(
            "vllm.entrypoints.openai.responses.serving:OpenAIServingResponses.responses_stream_generator",
            validation.responses_stream_generator,
        ),
    ),
    watches=("vllm.entrypoints.utils:create_error_response",),
)

PATCHES: tuple[Patch, ...] = (
    GRAMMAR_POSITIONS,
    THINKING_BUDGET,
    MIN_TOKENS,
    ALLOWED_TOKENS,
    STOP_STRINGS,
    RESPONSES_SCHEMA,
    REQUEST_ERRORS,
)
