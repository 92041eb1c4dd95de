"""Tune an adapter against a vLLM server by a loss of your own: a black box.

The loss is whatever this script makes of the server's answers. Here it is what
`zo-peft train --engine vllm` minimises too, of label words behind a few texts; but `loss_at` may
ask for anything, once or often. Here, the base only says what shapes the adapter has.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve zo_peft/embedded/model --enable-lora
    python scripts/black_box.py --url http://127.0.0.1:8000 --model zo_peft/embedded/model
"""

import argparse
import secrets
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from zo_peft import ZOConfig, ZOTrainer
from zo_peft.core.batch import Batch
from zo_peft.data import read_rows
from zo_peft.engines.vllm import Place, Server
from zo_peft.models.loading import load_tokenizer
from zo_peft.objectives.scoring import BlackBoxObjective
from zo_peft.tools.demo import EMBEDDED, LABEL_WORDS, TEMPLATE

TIMEOUT_SECONDS = 60
LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])


class Box:
    """The loss of the label words behind the first texts, at a server.

    Args:
        server: which has the embedded model.
        count: of texts.
    """

    def __init__(self, server: Server, count: int) -> None:
        self.server, rows = server, read_rows(EMBEDDED / "train.jsonl")[:count]
        tokenizer = load_tokenizer(str(EMBEDDED / "model"))
        self.words = [tokenizer(f" {word}").input_ids[-1] for word in LABEL_WORDS.split(",")]
        prompts = [tokenizer(TEMPLATE.format(text=row["text"])).input_ids for row in rows]
        self.places: list[Place] = [(prompt, self.words) for prompt in prompts]
        self.labels = torch.tensor([row["label"] for row in rows])

    def loss_at(self, adapter: dict[str, Tensor]) -> float:
        """The loss with an adapter, which the server reads from a folder."""
        with tempfile.TemporaryDirectory(prefix="black-box-") as folder:
            LORA.save_pretrained(folder)
            tensors = {name: tensor.cpu().contiguous() for name, tensor in adapter.items()}
            save_file(tensors, Path(folder, "adapter_model.safetensors"))
            # Servers keep what they computed by this salt, so it never comes again.
            found = self.server.answer(Path(folder), secrets.token_hex(16), self.places)
        scores = [
            [known[word] for word in words] for (known, _), (_, words) in zip(found, self.places)
        ]
        return cross_entropy(torch.tensor(scores), self.labels).item()


def tune(
    url: str, model: str, output_dir: Path, texts: int, **settings: Any
) -> tuple[float, float]:
    """Tune a LoRA at the server and save it in a folder; the loss before and after."""
    box = Box(Server(url, model, TIMEOUT_SECONDS), texts)
    trainer = ZOTrainer(
        str(EMBEDDED / "model"),
        ZOConfig(
            str(output_dir),
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            **settings,
        ),
        peft_config=LORA,
        objective=BlackBoxObjective(box.loss_at),
    )

    def loss() -> float:
        return float(trainer.objective.losses(trainer.model, Batch()))

    before = loss()
    trainer.train()
    trainer.save_model()
    return before, loss()


def main() -> None:
    """Print the loss before and after."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--url", required=True, help="the server's, without a path")
    parser.add_argument("--model", default=str(EMBEDDED / "model"), help="its name for the base")
    parser.add_argument("--output_dir", type=Path, default=Path("out/black_box"))
    parser.add_argument("--max_forward_passes", type=int, default=1000)
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--zo_eps", type=float, help="the default is automatic")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    before, after = tune(
        given.url,
        given.model,
        given.output_dir,
        given.texts,
        max_forward_passes=given.max_forward_passes,
        zo_eps=given.zo_eps,
        seed=given.seed,
    )
    print(f"loss {before:.4f} -> {after:.4f}; the adapter is in {given.output_dir}")


if __name__ == "__main__":
    main()
