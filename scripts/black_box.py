"""Tune an adapter against a server that serves it and says how well it does: a black box.

The server stands for one like vLLM's or llama.cpp's with LoRA: it has its own copy of the base, and
its own idea of a loss. It is sent `POST URL/v1/load_lora_adapter` with the adapter as safetensors
(the tensors of `adapter_model.safetensors`), then `POST URL/v1/score` with `{}`, to which it
answers `{"loss": NUMBER}`. Here the base only says what shapes the adapter has.

    python scripts/black_box.py --url http://127.0.0.1:8000
"""

import argparse
import json
from pathlib import Path
from urllib.request import Request, urlopen

from peft import LoraConfig
from safetensors.torch import save
from torch import Tensor

from zo_peft import ZOConfig, ZOTrainer
from zo_peft.core.batch import Batch
from zo_peft.objectives.scoring import BlackBoxObjective
from zo_peft.tools.demo import EMBEDDED

TIMEOUT_SECONDS = 60


def post(url: str, body: bytes, content_type: str) -> bytes:
    """The body of the server's answer."""
    request = Request(url, data=body, headers={"Content-Type": content_type})
    with urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
        return answer.read()


def loss_at(url: str, adapter: dict[str, Tensor]) -> float:
    """The server's loss with an adapter."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in adapter.items()}
    post(f"{url}/v1/load_lora_adapter", save(tensors), "application/octet-stream")
    return float(json.loads(post(f"{url}/v1/score", b"{}", "application/json"))["loss"])


def tune(url: str, output_dir: Path, max_forward_passes: int, seed: int = 0) -> tuple[float, float]:
    """Tune a LoRA at the server and save it in a folder; the loss before and after."""
    trainer = ZOTrainer(
        str(EMBEDDED / "model"),
        ZOConfig(
            str(output_dir),
            max_forward_passes=max_forward_passes,
            seed=seed,
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        ),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]),
        objective=BlackBoxObjective(lambda adapter: loss_at(url, adapter)),
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
    parser.add_argument("--output_dir", type=Path, default=Path("out/black_box"))
    parser.add_argument("--max_forward_passes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    before, after = tune(
        given.url.rstrip("/"), given.output_dir, given.max_forward_passes, given.seed
    )
    print(f"loss {before:.4f} -> {after:.4f}; the adapter is in {given.output_dir}")


if __name__ == "__main__":
    main()
