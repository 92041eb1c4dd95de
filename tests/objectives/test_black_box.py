"""Black boxes: an adapter tuned at an HTTP server, and functions of the adapter alone."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load, load_file
from tiny import LORA, MODEL
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts import black_box
from zo_peft import ZOConfig, ZOTrainer
from zo_peft.core.batch import Batch
from zo_peft.data import read_rows
from zo_peft.objectives.scoring import BlackBoxObjective
from zo_peft.tools.demo import EMBEDDED, LABEL_WORDS, TEMPLATE


class Server(HTTPServer):
    """A base with an adapter, and the loss of label words on 32 texts, by plain PEFT."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        torch.manual_seed(7)
        self.model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), LORA).eval()
        tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
        rows = read_rows(EMBEDDED / "train.jsonl")[:32]
        prompts = [TEMPLATE.format(text=row["text"]) for row in rows]
        self.batch = tokenizer(prompts, return_tensors="pt", padding=True)
        words = [tokenizer(" " + word).input_ids[-1] for word in LABEL_WORDS.split(",")]
        self.right = torch.tensor([words[row["label"]] for row in rows])
        self.wrong = torch.tensor([words[1 - row["label"]] for row in rows])
        self.loaded = 0

    @torch.no_grad()
    def loss(self) -> float:
        logits = self.model(**self.batch).logits[:, -1]
        margin = logits.gather(1, self.right[:, None]) - logits.gather(1, self.wrong[:, None])
        return float(torch.nn.functional.softplus(-margin).mean())


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer = {}
        if self.path == "/v1/load_lora_adapter":
            unknown = set_peft_model_state_dict(self.server.model, load(body)).unexpected_keys
            self.server.loaded += 1
            self.send_response(400 if unknown else 200)
        elif self.path == "/v1/score":
            answer = {"loss": self.server.loss()}
            self.send_response(200)
        else:
            self.send_response(404)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    served = Server()
    thread = threading.Thread(target=served.serve_forever)
    thread.start()
    yield served
    served.shutdown()
    thread.join()
    served.server_close()


def test_a_servers_loss_falls_and_its_adapter_is_what_was_saved(
    server: Server, tmp_path: Path
) -> None:
    start = server.loss()
    before, after = black_box.tune(
        f"http://127.0.0.1:{server.server_port}", tmp_path, max_forward_passes=400
    )
    assert before == pytest.approx(start)  # B is 0: no new adapter changes anything
    assert after < before - 0.2
    assert 400 <= server.loaded + 8 <= 410  # one adapter a forward pass
    served = server.loss()
    assert served == pytest.approx(after)
    base = AutoModelForCausalLM.from_pretrained(MODEL)
    server.model = PeftModel.from_pretrained(base, tmp_path).eval()
    assert server.loss() == pytest.approx(served, rel=1e-5)


def test_it_needs_no_data_and_is_given_the_tensors_of_the_file(tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []

    def size(adapter: dict[str, Tensor]) -> float:
        seen.append({name: tensor.clone() for name, tensor in adapter.items()})
        return float(sum(tensor.square().sum() for tensor in adapter.values()))

    trainer = ZOTrainer(
        MODEL,
        ZOConfig(str(tmp_path), max_steps=3, zo_eps=0.01, use_cpu=True, save_strategy="no"),
        peft_config=LORA,
        objective=BlackBoxObjective(size),
    )
    trainer.train()
    assert len(seen) == trainer.forward_passes == 3 * trainer.args.num_candidates
    trainer.save_model()
    saved = load_file(tmp_path / "adapter_model.safetensors")
    trainer.objective.losses(trainer.model, Batch())
    assert seen[-1].keys() == saved.keys()
    assert all(torch.equal(seen[-1][name], saved[name]) for name in saved)
    perturbed = seen[0]
    assert all(not torch.equal(perturbed[name], saved[name]) for name in saved)
