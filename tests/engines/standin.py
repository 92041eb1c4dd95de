"""A stand-in for a vLLM server: its dialect of HTTP, and two of its traps, over PyTorch and PEFT.

It keeps what it computed of a prompt by the `cache_salt` alone, whatever the adapter is. And
`prompt_logprobs` end it.
"""

import json
import threading
from collections.abc import Callable
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

#: How much it keeps, and the log-probabilities that a request may ask for.
KEPT, LOGPROBS = 300, 20


class Refusal(Exception):
    """A status code and a message."""


class StandIn(ThreadingHTTPServer):
    """A server that has started, at `url`.

    Attributes:
        before: called with the path and the body of each POST, before it is answered.
        after: called with each answer to a completion, which it may change.
    """

    # Python must not end while PyTorch computes in another thread.
    daemon_threads = False

    def __init__(self, model: Any, name: str, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.model, self.name, self.dead, self.killed = model, name, False, False
        self.adapters: dict[str, Any] = {}
        self.kept: dict[Any, Any] = {}
        self.lock = threading.Lock()
        self.asked: list[str] = []
        self.before: Callable[[str, dict[str, Any]], None] = lambda path, body: None
        self.after: Callable[[dict[str, Any]], None] = lambda answer: None
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def stop(self) -> None:
        """Die, with all adapters, and answer nothing any more."""
        self.killed = True
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that have gone."""

    def load(self, body: dict[str, Any]) -> str:
        name, path = body["lora_name"], body["lora_path"]
        if not Path(path, "adapter_config.json").is_file():
            raise Refusal(404, f"No adapter found for {path}")
        if name in self.adapters and not body.get("load_inplace"):
            raise Refusal(400, f"{name} has already been loaded")
        with self.lock:
            self.adapters[name] = PeftModel.from_pretrained(deepcopy(self.model), path).eval()
        return "Success"

    def unload(self, body: dict[str, Any]) -> str:
        if self.adapters.pop(body["lora_name"], None) is None:
            raise Refusal(404, f"{body['lora_name']} cannot be found")
        return "Success"

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        self.dead |= "prompt_logprobs" in body
        if self.dead:
            raise Refusal(500, "EngineDeadError")
        name, tokens = body["model"], body.get("logprob_token_ids", [])
        if name != self.name and name not in self.adapters:
            raise Refusal(404, f"The model {name} does not exist")
        if not len(tokens) == body.get("logprobs", 0) <= LOGPROBS:
            raise Refusal(400, "so many logprobs are not allowed")
        model = self.adapters.get(name, self.model)
        if not tokens:
            answer = {"model": name, "choices": [self.drawn(model, body)]}
            self.after(answer)
            return answer
        choices = []
        for index, ids in enumerate(body["prompt"]):
            known = self.known(model, body.get("cache_salt"), ids)
            likeliest = int(known.argmax())
            told = {f"token_id:{token}": known[token].item() for token in [likeliest, *tokens]}
            choices.append({"index": index, "logprobs": {"top_logprobs": [told]}})
            choices[-1] |= {"prompt_token_ids": ids, "token_ids": [likeliest]}
        answer = {"model": name, "choices": choices[::-1]}
        self.after(answer)
        return answer

    @torch.no_grad()
    def drawn(self, model: Any, body: dict[str, Any]) -> dict[str, Any]:
        """A completion with noise that depends on the seed alone, as vLLM draws it."""
        [ids], drawn, reason = body["prompt"], [], "length"
        generator = torch.Generator().manual_seed(body.get("seed", 0))
        while len(drawn) < body["max_tokens"] and reason == "length":
            with self.lock:
                logits = model(torch.tensor([ids + drawn])).logits[0, -1]
            if body["temperature"]:
                shares = (logits / body["temperature"]).softmax(-1)
                logits = shares / torch.empty_like(shares).exponential_(generator=generator)
            drawn.append(int(logits.argmax()))
            if drawn[-1] in body["stop_token_ids"]:
                reason = "stop"
        told = {"prompt_token_ids": ids, "token_ids": drawn, "finish_reason": reason}
        return {"index": 0} | told

    @torch.no_grad()
    def known(self, model: Any, salt: str | None, ids: list[int]) -> torch.Tensor:
        """The log-probabilities behind a prompt, of which all but its last token may be kept."""
        key = salt, *ids[:-1]
        with self.lock:
            if len(ids) > 1 and key not in self.kept:
                if len(self.kept) > KEPT:
                    self.kept.clear()
                self.kept[key] = model(torch.tensor([ids[:-1]]), use_cache=True).past_key_values
            past = deepcopy(self.kept.get(key))
            return (
                model(torch.tensor([ids[-1:]]), past_key_values=past).logits[0, -1].log_softmax(0)
            )


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: StandIn

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answers = {"load_lora_adapter": server.load, "unload_lora_adapter": server.unload}
        answers |= {"completions": server.complete}
        server.asked.append(self.path)
        try:
            server.before(self.path, body)
            self.reply(200, answers[self.path.removeprefix("/v1/")](body))
        except Refusal as refusal:
            code, message = refusal.args
            self.reply(code, {"error": {"message": message, "code": code}})

    def reply(self, code: int, content: Any) -> None:
        if self.server.killed:
            return
        is_text = isinstance(content, str)
        data = (content if is_text else json.dumps(content)).encode()
        self.send_response(code)
        self.send_header("Content-Type", "text/plain" if is_text else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
