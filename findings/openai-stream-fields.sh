#!/usr/bin/env bash
# One would guess: what a server sends beside OpenAI's own fields reaches the completion that openai's stream helper
# (chat.completions.stream, get_final_completion) puts together; `reasoning`, sent in the deltas, does.
# What happens: it depends on the place. In a delta, texts are joined and numbers added up, whatever they mean: a role sent
# with each delta becomes "assistantassistant", a flag becomes 3. On a choice only the first chunk counts: the token_ids
# that vLLM sends with return_token_ids are those of the first chunk, and stop_reason, which comes last, is not there. Lists
# of objects in a delta raise, unless they have an index. create(stream=True) gives each chunk as it was sent.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet openai==3.57.0
cat >fields.py <<'PY'
import json, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
import openai

deltas = [
    {"role": "assistant", "content": "", "draft": True},
    {"role": "assistant", "reasoning": "Two and", "draft": True},
    {"role": "assistant", "reasoning": " two.", "content": "4", "draft": True},
]
token_ids, sent = [[], [7], [8, 9]], []

class Server(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in sent).encode() + b"data: [DONE]\n\n"
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

def chunks(deltas):
    choices = [{"index": 0, "delta": delta, "finish_reason": None, "token_ids": ids}
               for delta, ids in zip(deltas, token_ids)]
    choices[-1] |= {"finish_reason": "stop", "stop_reason": 106}
    return [{"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]} for choice in choices]

server = HTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = openai.OpenAI(api_key="none", base_url=f"http://127.0.0.1:{server.server_port}/v1", max_retries=0)
ask = {"model": "m", "messages": [{"role": "user", "content": "2 + 2?"}]}

print("openai", openai.__version__)
sent[:] = chunks(deltas)
received = [chunk.choices[0] for chunk in client.chat.completions.create(stream=True, **ask)]
assert [choice.token_ids for choice in received] == token_ids and received[-1].stop_reason == 106
with client.chat.completions.stream(**ask) as stream:
    choice = stream.get_final_completion().choices[0]
seen = {name: getattr(choice.message, name) for name in ("content", "reasoning", "role", "draft")}
seen |= {name: getattr(choice, name, "not there") for name in ("finish_reason", "token_ids", "stop_reason")}
print("each chunk:", deltas, token_ids, "then the helper:", seen, sep="\n")
assert seen == {"content": "4", "reasoning": "Two and two.", "role": "assistant" * 3, "draft": 3,
                "finish_reason": "stop", "token_ids": [], "stop_reason": "not there"}

sent[:] = chunks([{"role": "assistant", "sources": [{"page": page}]} for page in range(3)])
try:
    with client.chat.completions.stream(**ask) as stream:
        stream.get_final_completion()
    raise SystemExit("a list of objects was taken")
except RuntimeError as error:
    print("a list of objects in each delta: RuntimeError:", error)
    assert "index" in str(error)
PY
env/bin/python -W ignore fields.py
