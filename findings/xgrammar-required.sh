#!/usr/bin/env bash
# One would guess: a name in "required" of a JSON schema is a key that xgrammar's grammar cannot leave out; or xgrammar
# warns, as it does for multipleOf of a number.
# What happens: only names that the same object lists in "properties" are required. A map with one key that must be there
# (its value described by additionalProperties or patternProperties) may be {}, without a warning. Where nothing describes
# other keys, strict mode, the default, turns the name round: {} is allowed and the required key is not. llguidance requires
# the key in each of these.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet xgrammar==0.2.9 llguidance==1.9.1 numpy==2.2.6 torch==2.13.0
cat >required.py <<'PY'
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
number = {"type": "integer"}
with_key, without = '{"loss": 1}', ("{}", '{"other": 1}')
for rest, expected in (
    ({"properties": {"loss": number}, "additionalProperties": number}, (True, False, False)),
    ({"additionalProperties": number}, (True, True, True)),
    ({"patternProperties": {"^[a-z]+$": number}}, (True, True, True)),
    ({}, (False, True, False)),
):
    schema = {"type": "object", **rest, "required": ["loss"]}
    seen = {text: (by_xgrammar(schema, text), by_llguidance(schema, text)) for text in (with_key, *without)}
    print(json.dumps(schema))
    for text, answers in seen.items():
        print(f"    {text:12} xgrammar: {answers[0]}, llguidance: {answers[1]}")
    assert tuple(answer for answer, _ in seen.values()) == expected
    assert [answer for _, answer in seen.values()] == [True, False, False]
by_xgrammar({"type": "number", "multipleOf": 0.5}, "1")
PY
env/bin/python -W ignore required.py 2>errors || { cat errors >&2; exit 1; }
grep Warning errors
[ "$(grep -c Warning errors)" = 1 ] && grep -q "Warning: multipleOf" errors
