"""Every type of PEFT and option of LoRA: in lanes, one by one or refused; and loaded as saved.

On a small llama and a small opt, many candidates of several examples in one forward are compared
with plain PEFT, one at a time (`exactness.py`). Then what is tuned is displaced and saved, and a
new process loads it with PEFT alone and compares the logits.

    python scripts/adapters.py                       # prints the matrix, some minutes
    python scripts/adapters.py --only LORA "LORA bias=all" --bases float32 int8
"""

import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from exactness import LENGTH, VOCABULARY, parser, quiet, tokens, verdict
from peft import PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import config as lora
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)
from workloads import BASES

from zo_peft.core.direction import Direction
from zo_peft.core.flat_space import FlatSpace
from zo_peft.errors import UserError
from zo_peft.models.adapters import add_adapter, prepare, save_adapter, tuned_parameters

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
TARGETS = ["q_proj", "v_proj"]
#: What a type needs, or what suits a model that is 64 wide; the default is `TARGETS` alone.
TYPES: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"target_modules": None, "adapter_layers": 2, "adapter_len": 3},
    "C3A": {"block_size": 16},
    "CPT": {"cpt_token_ids": [5, 6], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]},
    "IA3": {"feedforward_modules": []},
    "LN_TUNING": {"target_modules": r".*(input_layernorm|self_attn_layer_norm)"},
    "ROAD": {"group_size": 16},
    "SHADOW": {"target_modules": None},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"target_modules": None, "token_indices": tokens(9, 5)},
    "VBLORA": {"vector_length": 16, "num_vectors": 8},
    "WAVEFT": {"n_frequency": 64},
    "XLORA": {"adapters": {}},
}
TYPES |= {
    kind: {"num_virtual_tokens": 3} for kind in ("PREFIX_TUNING", "PROMPT_TUNING", "CARTRIDGE")
}
TYPES |= {kind: {"num_virtual_tokens": 3} for kind in ("P_TUNING", "MULTITASK_PROMPT_TUNING")}
#: Options of types, by the words that name them.
OPTIONS: dict[str, dict[str, Any]] = {
    "LORA all-linear": {"target_modules": "all-linear"},
    "LORA bias=all": {"bias": "all"},
    "LORA bias=lora_only": {"bias": "lora_only"},
    "LORA use_rslora": {"use_rslora": True},
    "LORA use_dora": {"use_dora": True},
    "LORA lora_bias": {"lora_bias": True},
    "LORA lora_dropout": {"lora_dropout": 0.1},
    "LORA rank_pattern": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4}},
    "LORA layers_to_transform": {"layers_to_transform": [1]},
    "LORA layers_pattern": {"layers_to_transform": [0], "layers_pattern": "layers"},
    "LORA layer_replication": {"layer_replication": [[0, 2], [0, 2]]},
    "LORA modules_to_save=lm_head": {"modules_to_save": ["lm_head"]},
    "LORA modules_to_save=embed_tokens": {"modules_to_save": ["embed_tokens"]},
    "LORA embed_tokens": {"target_modules": ["embed_tokens", "q_proj"]},
    "LORA lm_head": {"target_modules": ["lm_head", "q_proj"]},
    "LORA ensure_weight_tying": {
        "target_modules": ["embed_tokens", "lm_head", "q_proj"],
        "ensure_weight_tying": True,
    },
    "LORA trainable_token_indices": {"trainable_token_indices": tokens(9, 5)},
    "LORA target_parameters": {"target_parameters": ["q_proj.weight"], "target_modules": []},
    **{
        f"LORA init_lora_weights={init}": {"init_lora_weights": init}
        for init in (
            False,
            "gaussian",
            "pissa",
            "pissa_niter_2",
            "olora",
            "orthogonal",
            "mica",
            "eva",
        )
    },
    "LORA init_lora_weights=loftq": {
        "init_lora_weights": "loftq",
        "loftq_config": lora.LoftQConfig(),
    },
    "LORA init_lora_weights=corda": {
        "init_lora_weights": "corda",
        "corda_config": lora.CordaConfig(),
    },
    "LORA init_lora_weights=lora_ga": {
        "init_lora_weights": "lora_ga",
        "lora_ga_config": lora.LoraGAConfig(),
    },
    "LORA exclude_modules": {"exclude_modules": ["v_proj"]},
    "LORA use_bdlora": {"use_bdlora": lora.BdLoraConfig(["q_proj"], ["v_proj"], nblocks=2)},
    "LORA use_qalora": {"use_qalora": True, "qalora_group_size": 16},
    "LORA kasa_config": {"kasa_config": lora.KasaConfig()},
    "LORA monteclora_config": {"monteclora_config": lora.MontecloraConfig()},
    "LORA velora_config": {"velora_config": lora.VeloraConfig()},
    "LORA arrow_config": {"arrow_config": lora.ArrowConfig()},
    "LORA alora_invocation_tokens": {"alora_invocation_tokens": [12, 13]},
    "VERA bias=vera_only": {"bias": "vera_only"},
    "PREFIX_TUNING prefix_projection": {"prefix_projection": True, "encoder_hidden_size": 8},
}
#: The base and folders of adapters in, the logits of each out.
LOADS = """
import json, sys, warnings, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
warnings.simplefilter("ignore")
for base, folder in json.loads(sys.argv[1]):
    try:
        model = AutoModelForCausalLM.from_pretrained(base)
        model = PeftModel.from_pretrained(model, folder).eval()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([json.loads(sys.argv[2])])).logits[0, -1]
        print("LOGITS", json.dumps(logits.tolist()))
    except Exception as error:
        print("LOGITS", json.dumps(f"{type(error).__name__}: {error}"))
"""


def shapes() -> dict[str, PreTrainedModel]:
    """The two bases, with random weights that are large enough to matter."""
    torch.manual_seed(0)
    llama = LlamaConfig(
        **SIZES, intermediate_size=128, num_key_value_heads=2, initializer_range=0.1
    )
    opt = OPTConfig(**SIZES, ffn_dim=128, word_embed_proj_dim=64, init_std=0.1)
    return {"llama": LlamaForCausalLM(llama), "opt": OPTForCausalLM(opt)}


def adapted(base: PreTrainedModel, name: str) -> PeftModel:
    """A new adapter of the row on a base, as a trainer makes and prepares it."""
    kind = name.split()[0]
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    has = config_class.__dataclass_fields__
    settings: dict[str, Any] = {"target_modules": TARGETS} if "target_modules" in has else {}
    settings |= TYPES.get(kind, {}) | OPTIONS.get(name, {})
    torch.manual_seed(1)
    try:
        config = config_class(task_type="CAUSAL_LM", **settings)
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"by PEFT: {error}".splitlines()[0]) from None
    model = add_adapter(base, config)
    prepare(model, SimpleNamespace(pad_token_id=0))
    return model.eval()


def saved(model: PeftModel, folder: Path) -> list[float]:
    """Displace and save what is tuned; the logits that it gives."""
    space = FlatSpace(tuned_parameters(model))
    space.move(LENGTH * Direction.of(7))
    save_adapter(model, str(folder))
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens(9, 9)])).logits[0, -1].tolist()


def try_row(name: str, base: Path, kind: str, folder: Path) -> tuple[str, list[float] | None]:
    """The verdict of a row on a base, and the logits of what was saved."""

    def load() -> PeftModel:
        loaded = AutoModelForCausalLM.from_pretrained(base, **BASES[kind])
        return adapted(loaded, name)

    try:
        said = [verdict(load(), what) for what in ("words", "options", "completions")]
        worst = next((s for s in said if s.startswith(("TRACE", "WRONG", "refused"))), said[0])
        done = None if worst != said[0] or not said[0].startswith(("exact", "one")) else load()
        return worst, done and saved(done, folder)
    except UserError as error:
        return f"refused: {error}", None
    except Exception as error:
        return f"TRACEBACK: {type(error).__name__}: {error}".splitlines()[0], None


def reloaded(pairs: list[tuple[str, str]]) -> list[Any]:
    """The logits of adapters that a new process loads with PEFT alone."""
    command = [sys.executable, "-c", LOADS, json.dumps(pairs), json.dumps(tokens(9, 9))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("LOGITS ")]
    return [json.loads(line.partition(" ")[2]) for line in lines]


def main() -> None:
    """Print the matrix."""
    made = parser(__doc__ or "")
    made.add_argument("--bases", nargs="*", default=["float32"], choices=BASES)
    arguments = made.parse_args()
    quiet()
    names = [kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING] + [*OPTIONS]
    rows: list[tuple[str, str, str, list[float] | None]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for shape, model in shapes().items():
            model.save_pretrained(Path(scratch) / shape)
        pairs = []
        for name in arguments.only or sorted(names):
            for shape in ("llama", "opt"):
                for kind in arguments.bases:
                    base, folder = Path(scratch) / shape, Path(scratch) / str(len(rows))
                    said, logits = try_row(name, base, kind, folder)
                    print(name, shape, kind, said, file=sys.stderr, flush=True)
                    if kind != "float32":
                        logits = None
                    rows.append((name, f"{shape} {kind}", said, logits))
                    if logits is not None:
                        pairs.append((str(base), str(folder)))
        found = iter(reloaded(pairs) if pairs else [])
        print("| adapter | base | lanes | saved and loaded |\n| --- | --- | --- | --- |")
        for name, where, said, logits in rows:
            loaded = "" if logits is None else _compared(logits, next(found))
            print(f"| {name} | {where} | {said[:160]} | {loaded} |")


def _compared(logits: list[float], loaded: list[float] | str) -> str:
    if isinstance(loaded, str):
        return loaded[:80]
    off = (torch.tensor(logits) - torch.tensor(loaded)).abs().max().item()
    return "the same" if off < 1e-4 else f"off by {off:.2g}"


if __name__ == "__main__":
    with warnings.catch_warnings():
        main()
