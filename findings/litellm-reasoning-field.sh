#!/usr/bin/env bash
# One would guess: a message that litellm got from a server can be put into the next request as it is, and the server
# finds the fields that it sent.
# What happens: a server that sends `reasoning` (vLLM does) gets the text back as `reasoning_content`, and litellm's own
# `provider_specific_fields` goes over the wire beside it. A server that reads only `reasoning` loses what was thought;
# one that refuses unknown fields refuses the request. The same with the provider made for vLLM, `hosted_vllm/`.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet litellm==1.110.2
LITELLM_LOCAL_MODEL_COST_MAP=True env/bin/python -W ignore - <<'PY'
import json, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
import litellm

sent = {"role": "assistant", "reasoning": "Two and two.", "content": "4"}
requests = []

class Server(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        requests.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        choice = {"index": 0, "message": sent, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        reply = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}
        body = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

server = HTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
print("litellm", version("litellm"), "\nserver sent:", sent)
for model in ("openai/m", "hosted_vllm/m"):
    def ask(*messages):
        reply = litellm.completion(model=model, api_key="none", messages=list(messages),
                                   api_base=f"http://127.0.0.1:{server.server_port}/v1")
        return reply.choices[0].message
    user = {"role": "user", "content": "2 + 2?"}
    ask(user, ask(user), user)
    back = requests[-1]["messages"][1]
    print(f"{model}: server got back: {back}")
    assert "reasoning" not in back and back["reasoning_content"] == sent["reasoning"]
    assert back["provider_specific_fields"] == {"reasoning": sent["reasoning"]}
PY
