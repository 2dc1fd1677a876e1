#!/usr/bin/env bash
# One would guess: "exclusiveMinimum": 0 of a JSON schema keeps llguidance from 0, whatever the maximum is.
# What happens: if the bound is a whole number and the other bound lies before the next one (0 and 0.5, 1 and 1.1), the
# bound itself is allowed: 0 is a number above 0. Written 0.0 it is refused, and with a maximum of 1 all is right.
# The same for "exclusiveMaximum": 0 over -0.5, with -0. A chance, a rate or a temperature asked for in (0, 0.5] may be 0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet llguidance==1.9.1 numpy==2.2.6
env/bin/python - <<'PY'
import json
from importlib.metadata import version
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

class Bytes:  # token 0 ends the sequence, token 1 + n is byte n
    bos_token_id = unk_token_id = None
    eos_token_id, special_token_ids = 0, [0]
    tokens = [b"</s>", *(bytes([n]) for n in range(256))]
    def __call__(self, text):
        return [1 + n for n in (text.encode() if isinstance(text, str) else text)]

tokenizer = LLTokenizer(TokenizerWrapper(Bytes()))

def accepted(bounds, text):
    grammar = LLMatcher.grammar_from_json_schema(json.dumps({"type": "number", **bounds}))
    matcher, tokens = LLMatcher(tokenizer, grammar, log_level=0), [1 + n for n in text.encode()]
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

print("llguidance", version("llguidance"))
for bounds, wrong, right, inside in (
    ({"exclusiveMinimum": 0, "maximum": 0.5}, "0", ["0.0", "0.6", "-1"], "0.25"),
    ({"exclusiveMinimum": 1, "maximum": 1.1}, "1", ["1.0", "0", "2"], "1.05"),
    ({"exclusiveMaximum": 0, "minimum": -0.5}, "-0", ["0", "-0.0", "1"], "-0.25"),
    ({"exclusiveMinimum": 0, "maximum": 1}, None, ["0", "0.0", "2"], "0.25"),
    ({"exclusiveMinimum": 0}, None, ["0", "0.0", "-1"], "0.25"),
):
    answers = {text: accepted(bounds, text) for text in (*([wrong] if wrong else []), *right, inside)}
    print(json.dumps(bounds), {text: "allowed" if yes else "refused" for text, yes in answers.items()})
    assert answers[inside] and not any(answers[text] for text in right)
    assert wrong is None or answers[wrong]
PY
