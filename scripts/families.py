"""Every family of causal models and of sequence classifiers in transformers, in a tiny form.

For each family a LoRA on random weights is evaluated as a step does it, many candidates of several
examples in one forward, and compared with plain PEFT, one at a time (`exactness.py`). Windows are
16 tokens, and most prompts are longer.

    python scripts/families.py                      # prints the table, a few minutes
    python scripts/families.py --only mistral bert
"""

from types import SimpleNamespace
from typing import Any

import torch
from exactness import VOCABULARY, parser, quiet, tokens, verdict
from peft import LoraConfig
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

from zo_peft.errors import UserError
from zo_peft.models.adapters import add_adapter, prepare

#: Sizes by the names that configurations have for them.
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "initializer_range": 0.2,
    "init_std": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "dim_model", "dim"), 32),
    **dict.fromkeys(("embedding_size", "word_embed_proj_dim", "hidden_dim"), 32),
    **dict.fromkeys(("hidden_size_global", "adapter_in_dim", "adapter_out_dim"), 32),
    **dict.fromkeys(("adapter_input_size", "d_latents"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "dim_ff"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size", "dff"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_self_attends_per_block"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("head_dim", "attention_head_size", "d_kv", "dim_head"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts", "num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"), 1),
    **dict.fromkeys(("sliding_window", "window_size", "attention_chunk_size"), 16),
    **dict.fromkeys(("sliding_window_size", "local_attention", "keep_window_size"), 16),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "mamba_d_ssm"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("vocab_size_per_layer_input", "encoder_hash_byte_group_vocab"), VOCABULARY),
    "hidden_size_per_layer_input": 8,
    **dict.fromkeys(("index_topk", "mamba_n_heads", "mamba_d_head", "num_latents"), 8),
    "num_kv_shared_layers": 0,
    **dict.fromkeys(("image_size", "patch_size"), 16),
}


#: Sizes that some families do not take beside the others.
WITHOUT: list[set[str]] = [set(), {"layer_types"}, {"num_key_value_heads"}, {"head_dim"}]
WITHOUT += [{"num_key_value_heads", "head_dim"}, {"layer_types", "num_key_value_heads"}]
WITHOUT += [{"layer_types", "head_dim", "num_key_value_heads", "num_experts_per_tok"}]
WITHOUT += [{"layer_types", "num_hidden_layers", "num_key_value_heads"}]
#: What single families need beside small sizes.
OWN: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
            for kind in ("full_attention", "sliding_attention")
        },
    },
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 32},
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lilt": {"hidden_size": 48},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds": False,
        "hash_seed": 0,
        "num_buckets": 4,
        **dict.fromkeys(("local_attn_chunk_length", "lsh_attn_chunk_length"), 16),
    },
    "t5": {"decoder_start_token_id": 0},
    "xmod": {"default_language": "en_XX"},
}


def small(config_class: type[PreTrainedConfig], without: set[str]) -> PreTrainedConfig:
    """The configuration of a family with as many small sizes as it accepts."""
    default = config_class()

    def takes(name: str) -> bool:
        try:
            value = getattr(default, name)
            setattr(default, name, value)
            return name not in without and not isinstance(value, list | dict)
        except Exception:  # it has none, or one for each layer, or one that follows from others
            return False

    sizes = {name: size for name, size in SMALL.items() if takes(name)}
    # One of each kind of layer.
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    own = config_class.attribute_map.get("layer_types", "layer_types")
    fixed = isinstance(getattr(config_class, own, None), property)
    if kinds and not fixed and "layer_types" not in without:
        sizes |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    if "num_key_value_heads" in without and takes("num_attention_heads"):
        sizes["num_key_value_heads"] = SMALL["num_attention_heads"]
    for name in config_class.sub_configs:
        if (inner := getattr(default, name)) is not None:
            sizes[name] = small(type(inner), without)
    return config_class(**sizes | OWN.get(config_class.model_type, {}))


def build(family: str, classes: int | None) -> PreTrainedModel:
    """A tiny model of a family that runs, with random weights that are large enough to matter."""
    errors = []
    auto = AutoModelForCausalLM if classes is None else AutoModelForSequenceClassification
    for without in WITHOUT:
        try:
            config = small(CONFIG_MAPPING[family], without)
            if classes is not None:
                config.num_labels = classes
            with torch.device("meta"):
                size = sum(p.numel() for p in auto.from_config(config).parameters())
            if size > 1.5e8:
                raise ValueError(f"these sizes leave it {size:,} parameters")
            torch.manual_seed(0)
            model = auto.from_config(config)
            with torch.no_grad():
                cached = {} if classes else {"use_cache": False}
                model.eval()(input_ids=torch.tensor([[*tokens(30, 30), 2]]), **cached)
            return model
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}".splitlines()[0])
    raise ValueError(max(errors, key=errors.count))


def targets(model: PreTrainedModel) -> list[str]:
    """The linear layers inside of the transformer's layers, without routers of experts."""
    head = model.get_output_embeddings()
    # Grouped layers, as DeepSeek-V4 has them, multiply otherwise, and PEFT's LoRA does not fit.
    plain = (nn.Linear.forward, Conv1D.forward)
    modules = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    names = [n for n, m in modules if type(m).forward in plain and m is not head]
    # PEFT has its own for the blocks of state-space models.
    names = [n for n in names if n.rpartition(".")[2] not in ("gate", "router", "out_proj")]
    inside = [name for name in names if any(part.isdigit() for part in name.split("."))]
    return inside or names


def try_family(family: str, classes: int | None) -> dict[str, str]:
    """A verdict for each objective."""
    try:
        model = build(family, classes)
    except Exception as error:
        return {"all": f"not built: {error}"}
    kind = "CAUSAL_LM" if classes is None else "SEQ_CLS"
    try:
        adapted = add_adapter(
            model, LoraConfig(task_type=kind, r=4, target_modules=targets(model) or None)
        )
        prepare(adapted, SimpleNamespace(pad_token_id=0))
    except UserError as error:
        return {"all": f"refused: {error}"}
    except Exception as error:
        return {"all": f"TRACEBACK: {type(error).__name__}: {error}".splitlines()[0]}
    whats = ["words", "options", "completions"] if classes is None else ["classes"]
    return {what: verdict(adapted, what) for what in whats}


def main() -> None:
    """Print the table."""
    arguments = parser(__doc__ or "").parse_args()
    quiet()
    print("| family | objective | verdict |\n| --- | --- | --- |")
    for names, classes in (
        (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, None),
        (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, 3),
    ):
        for family in arguments.only or names:
            if family not in names:
                continue
            found = try_family(family, classes)
            together: dict[str, list[str]] = {}
            for what, said in found.items():
                together.setdefault(said, []).append(what)
            for said, whats in together.items():
                what = ", ".join(whats) if classes is None else "classes"
                print(f"| {family} | {what} | {said[:200]} |", flush=True)


if __name__ == "__main__":
    main()
