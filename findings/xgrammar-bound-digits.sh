#!/usr/bin/env bash
# One would guess: a bound on a number only takes away the numbers beyond it, and whatever xgrammar's grammar accepts is JSON.
# What happens: a number with a bound gets at most six decimals and no exponent. 0.0000001 and 1e-7 can be written without
# bounds and not between 0 and 1. Where no number of six decimals lies between the bounds (a learning rate or an epsilon
# above 0 and up to 1e-7), the value is the empty text: {"rate": } is accepted and nothing else is, without a warning.
# llguidance takes as many decimals as one writes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet xgrammar==0.2.9 llguidance==1.9.1 numpy==2.2.6 torch==2.13.0
cat >digits.py <<'PY'
import json
from importlib.metadata import version
import xgrammar
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

class Bytes:  # token 0 ends the sequence, token 1 + n is byte n
    bos_token_id = unk_token_id = None
    eos_token_id, special_token_ids = 0, [0]
    tokens = [b"</s>", *(bytes([n]) for n in range(256))]
    def __call__(self, text):
        return [1 + n for n in (text.encode() if isinstance(text, str) else text)]

compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo(Bytes.tokens, stop_token_ids=[0]))
tokenizer = LLTokenizer(TokenizerWrapper(Bytes()))

def by_xgrammar(schema, text):
    matcher = xgrammar.GrammarMatcher(compiler.compile_json_schema(json.dumps(schema)))
    return all(matcher.accept_token(token) for token in (*Bytes()(text), 0))

def by_llguidance(schema, text):
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(json.dumps(schema)), log_level=0)
    return matcher.try_consume_tokens(Bytes()(text)) == len(text) and matcher.is_accepting()

print("xgrammar", version("xgrammar"), "llguidance", version("llguidance"))
# bounds: what xgrammar accepts of an object {"rate": ...}, and what it refuses though it is right
for bounds, accepted, refused in (
    ({}, ["0.0000001", "1e-7", "0.1234567", "0.123456"], []),
    ({"minimum": 0, "maximum": 1}, ["0", "1", "0.123456"], ["0.0000001", "0.1234567"]),
    ({"minimum": 1.23456789}, ["1.234568"], ["1.2345679"]),
    ({"minimum": 1e-8, "maximum": 1e-7}, [""], ["0.0000001", "0.00000001"]),
    ({"exclusiveMinimum": 0, "maximum": 1e-7}, [""], ["0.0000001", "0.00000001"]),
    ({"minimum": 52.3702157, "maximum": 52.3702159}, [""], ["52.3702158"]),
):
    rate = {"type": "number", **bounds}
    schema = {"type": "object", "properties": {"rate": rate}, "required": ["rate"], "additionalProperties": False}
    texts = {value: f'{{"rate": {value}}}' for value in ["", *accepted, *refused]}
    seen = {value: (by_xgrammar(schema, text), by_llguidance(schema, text)) for value, text in texts.items()}
    print(json.dumps(bounds))
    for value, answers in seen.items():
        print(f"    {texts[value]:22} xgrammar: {answers[0]}, llguidance: {answers[1]}")
    assert [value for value, answers in seen.items() if answers[0]] == accepted
    assert [value for value, answers in seen.items() if answers[1]] == [value for value in seen if value]
    for value in (value for value in seen if value):
        number = json.loads(value)
        assert bounds.get("minimum", 0) <= number <= bounds.get("maximum", 99) and number >= bounds.get("exclusiveMinimum", 0)
assert by_xgrammar({"type": "number"}, "1e-7") and not by_xgrammar({"type": "number", "minimum": 0, "maximum": 1}, "1e-7")
PY
env/bin/python -W ignore digits.py 2>errors || { cat errors >&2; exit 1; }
! grep Warning errors
