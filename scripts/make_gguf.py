"""Write a small decoder of transformers as a GGUF file, for the engine llamacpp.

It knows the architectures that the engine knows, and writes no tokenizer, for zo_peft passes token
ids. For anything to be used elsewhere take `convert_hf_to_gguf.py` of llama.cpp.

    python scripts/make_gguf.py zo_peft/embedded/model demo.gguf --type Q4_0
"""

import argparse
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

TYPES = ("F32", "F16", "Q8_0", "Q4_0")


def write(model: Any, path: Path, kind: str = "F32") -> None:
    """Write a model of transformers to a GGUF file, its matrices as `kind`."""
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads["q_proj"])
    writer.add_head_count_kv(heads["k_proj"])
    width = getattr(config, "head_dim", None) or config.hidden_size // heads["q_proj"]
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    kinds = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[config.model_type], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module = name.split(".")[-2]
        if config.model_type == "llama" and module in heads:
            tensor = _interleaved(tensor, heads[module])
        stored = gguf.GGMLQuantizationType[kind if tensor.dim() > 1 else "F32"]
        data = gguf.quantize(tensor.float().numpy(), stored)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(rows: Tensor, heads: int) -> Tensor:
    """The rows of each head with the halves that rotary embeddings turn in alternation."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape).contiguous()


def main() -> None:
    """Convert a folder, or a model of the Hub."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("path", type=Path)
    parser.add_argument("--type", choices=TYPES, default="Q4_0")
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    write(model, given.path, given.type)
    print(f"{given.path.name}: {given.path.stat().st_size / 2**20:.1f} MiB as {given.type}")


if __name__ == "__main__":
    main()
