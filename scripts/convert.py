"""Write a small decoder of transformers in the form of an engine: a GGUF file, or OpenVINO's graph.

For llamacpp it knows the architectures that the engine knows, and writes no tokenizer, for zo_peft
passes token ids. Larger models are converted by `convert_hf_to_gguf.py` of llama.cpp, and by
optimum-intel.

    python scripts/convert.py zo_peft/embedded/model demo.gguf --type Q4_0
    python scripts/convert.py zo_peft/embedded/model demo_openvino --engine openvino --type int4
"""

import argparse
import ctypes
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


def write_gguf(model: Any, path: Path, kind: str = "F32") -> None:
    """Write a model of transformers to a GGUF file, its matrices as F32, Q8_0, Q4_0, Q4_K ..."""
    gguf, config = import_module("gguf"), model.config
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
        quantize = _k_quantized if kind.endswith("_K") and tensor.dim() > 1 else gguf.quantize
        data = quantize(tensor.float().numpy(), stored)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _k_quantized(rows: Any, kind: Any) -> Any:
    """The blocks of a matrix as k-quants, which llama.cpp makes alone."""
    package = Path(str(import_module("xllamacpp").__file__)).parent
    library = ctypes.CDLL(str(next(package.glob("xllamacpp*.so"))))
    block, size = import_module("gguf").GGML_QUANT_SIZES[kind]
    if rows.shape[1] % block:
        raise SystemExit(f"{kind.name} has blocks of {block} numbers, and a row {rows.shape[1]}")
    blocks = np.empty((len(rows), rows.shape[1] // block * size), np.uint8)
    given, made = rows.ctypes.data_as(ctypes.c_void_p), blocks.ctypes.data_as(ctypes.c_void_p)
    sizes = map(ctypes.c_int64, (0, *rows.shape))
    library.ggml_quantize_chunk(int(kind), given, made, *sizes, None)
    return blocks


def _interleaved(rows: Tensor, heads: int) -> Tensor:
    """The rows of each head with the halves that rotary embeddings turn in alternation."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape).contiguous()


class _Decoder(torch.nn.Module):
    """A model without a cache, whose modules have the names that they have in the model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.lm_head = model.model, model.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The logits of all positions."""
        hidden = self.model(input_ids, attention_mask, use_cache=False).last_hidden_state
        return self.lm_head(hidden)


def write_openvino(model: Any, folder: Path, kind: str = "f32") -> None:
    """Write a model's graph and configuration into a folder, its matrices as f32, int8 or int4."""
    openvino = import_module("openvino")
    some = torch.ones(2, 7, dtype=torch.long)
    inputs = {"input_ids": some, "attention_mask": some.clone()}
    graph = openvino.convert_model(_Decoder(model), example_input=inputs)
    if kind != "f32":
        nncf = import_module("nncf")
        mode = {"int8": "INT8_SYM", "int4": "INT4_SYM"}[kind]
        more = {"group_size": 64, "all_layers": True} if kind == "int4" else {}
        graph = nncf.compress_weights(graph, mode=nncf.CompressWeightsMode[mode], **more)
    model.config.save_pretrained(folder)
    openvino.save_model(graph, folder / "openvino_model.xml", compress_to_fp16=False)


def main() -> None:
    """Convert a folder, or a model of the Hub."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--engine", choices=["llamacpp", "openvino"], default="llamacpp")
    parser.add_argument("--type", help="F32, Q8_0, Q4_0, Q4_K; for openvino f32, int8 or int4.")
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    if given.engine == "llamacpp":
        write_gguf(model, given.output, given.type or "Q4_0")
    else:
        write_openvino(model, given.output, given.type or "int4")
        AutoTokenizer.from_pretrained(given.model).save_pretrained(given.output)
    print(f"{given.output} is written")


if __name__ == "__main__":
    main()
