"""Serve any reward over HTTP, for `reward=remote reward.url=http://localhost:8000`.

python examples/reward_server.py compressibility          # a name, pkg.mod:Name or path/to/file.py:name; port 8000
python examples/reward_server.py clip '{"prompt": "a red heart"}' 8001
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from safetensors.torch import load

import steerfm


def serve(reward: steerfm.Reward, port: int = 8000) -> ThreadingHTTPServer:
    """Return a server on this machine; call its ``serve_forever``. Port 0 takes a free port."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            try:
                size = int.from_bytes(body[:8], "little")
                prompts = json.loads(json.loads(body[8 : 8 + size]).get("__metadata__", {}).get("prompts", "null"))
                tensors = load(body)
                images = tensors["images"]
                images = images.float() / 255 if images.dtype == torch.uint8 else images
                with torch.inference_mode():
                    answer, code = {"scores": reward(images, prompts, tensors.get("labels")).tolist()}, 200
            except Exception as error:  # a bad request must not stop the server
                answer, code = {"error": f"{type(error).__name__}: {error}"}, 400
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    name, arguments, port = sys.argv[1:] + ["{}", "8000"][len(sys.argv) - 2 :]
    print(f"serving {name} on http://localhost:{port}")
    serve(steerfm.reward(name, **json.loads(arguments)), int(port)).serve_forever()
