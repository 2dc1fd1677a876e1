#!/usr/bin/env bash
# One would guess: a token that Guide.get_tokens() lists as allowed can be given to advance(), and accepts_tokens()
# says yes to it.
# What happens: at the end of a match the only token listed is the end of sequence, and Guide refuses it: advance()
# raises, accepts_tokens() says False. The same where the text may go on. A server that samples from the mask and
# advances by what was sampled has to treat this one token apart.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet outlines-core==0.2.14
env/bin/python - <<'PY'
from importlib.metadata import version
from outlines_core import Guide, Index, Vocabulary

END, A, B = 0, 1, 2
vocabulary = Vocabulary(END, {"a": [A], "b": [B]})
print("outlines-core", version("outlines-core"))
for regex, text in (("ab", [A, B]), ("a+", [A])):
    guide = Guide(Index(regex, vocabulary), 8)
    for token in text:
        assert guide.accepts_tokens([token])
        guide.advance(token)
    listed, finished, accepts = sorted(guide.get_tokens()), guide.is_finished(), guide.accepts_tokens([END])
    try:
        guide.advance(END)
        error = None
    except ValueError as caught:
        error = str(caught)
    print(f"{regex}: finished {finished}, tokens listed {listed}, accepts the end ({END}): {accepts}; advance: {error}")
    assert finished and END in listed and not accepts and error and "No next state" in error
PY
