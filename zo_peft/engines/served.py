"""A base of shapes alone, for which an engine answers.

It has the modules of a transformers model, so PEFT puts a LoRA on it, and Trainer trains it as any
other. Its own parameters take no memory, and only the LoRA's are numbers. The objectives ask it for
`next_tokens`, or to `generate`, which the engine answers.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from zo_peft.core.batch import Batch, Objective
from zo_peft.core.evaluator import Evaluator
from zo_peft.core.lanes import Host, Lanes
from zo_peft.core.ranks import Ranks
from zo_peft.core.space import Space
from zo_peft.engines.engine import Answers, Engine, EngineName, Matrices, Row, Sampling, States
from zo_peft.engines.llamacpp import LlamaCpp
from zo_peft.engines.openvino import MODEL_NAME, OpenVino
from zo_peft.engines.vllm import Vllm
from zo_peft.errors import UserError
from zo_peft.models.heads import lora_parameters
from zo_peft.models.hub import AnyModel
from zo_peft.models.loading import load_config, load_tokenizer
from zo_peft.models.peft_layers import is_plain_lora
from zo_peft.objectives.rewards import CommonNoise

#: The most bytes of the states of one call.
STATES = 64 << 20


def load_served(
    name: str, engine: EngineName, source: str | None = None, *chat: str | None, **servers: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base that an engine computes, in shapes alone, and its tokenizer.

    The base's attribute `engine` answers for it.

    Args:
        name: a GGUF file for llamacpp, a folder for openvino; for vllm what servers call the base.
        source: a folder or a Hub id with the configuration and the tokenizer of the model that was
            converted; default: what the file or the folder itself says of them.
        chat: where a chat template comes from, as of `load_tokenizer`.
        servers: for vllm, `urls`, `folder` and `timeout` of `Vllm`.

    Raises:
        UserError: the engine is not installed or does not answer, or the file or the configuration
            cannot be read.
    """
    path = Path(name)
    files = {"llamacpp": path, "openvino": path / MODEL_NAME}
    if engine in files and not files[engine].is_file():
        what = {"llamacpp": "a GGUF file", "openvino": f"a folder with {MODEL_NAME}"}[engine]
        raise UserError(f"the engine {engine} reads {what}; {name!r} is none")
    if source is None and engine == "llamacpp":
        config, tokenizer = _from_gguf(load_config, path), _from_gguf(load_tokenizer, path, *chat)
    else:
        config, tokenizer = load_config(source or name), load_tokenizer(source or name, *chat)
    base = shapes_of(config)
    base.name_or_path = base.config.name_or_path = source or name
    if source is not None or engine != "llamacpp":
        with suppress(OSError):  # Not every base has one.
            base.generation_config = GenerationConfig.from_pretrained(source or name)
    engines: dict[str, Callable[[], Engine]] = {
        "llamacpp": lambda: LlamaCpp(path, config),
        "openvino": lambda: OpenVino(path),
        "vllm": lambda: Vllm(name, **servers),
    }
    base.engine = engines[engine]()
    for method, answer in ANSWERS.items():
        setattr(base, method, partial(answer, base, Lanes({}, 1), ""))
    return base, tokenizer


def shapes_of(config: PreTrainedConfig) -> PreTrainedModel:
    """A base of this configuration that has no weights."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
    # One expanded number takes no memory. It is not a number, so that nothing can start from it.
    base._apply(lambda tensor: torch.full((1,), torch.nan).expand(tensor.shape))
    base.requires_grad_(False)
    base.forward = _refuse
    return base.eval()


def evaluator_of(
    model: PeftModel,
    space: Space,
    objective: Objective,
    candidates_per_forward: int | None = None,
    ranks: Ranks | None = None,
) -> Evaluator:
    """An evaluator that asks the engine for many candidates in one call."""
    base = model.get_base_model()
    replacements = {method: (base, method, answer) for method, answer in ANSWERS.items()}
    each = 4 * space.numel
    host = Host(replacements, lambda batch, parts: max(1, STATES // (each * parts)))
    return Evaluator(model, space, objective, host, candidates_per_forward, ranks)


def check_engine(model: AnyModel, engine: EngineName | None, processes: int) -> Engine | None:
    """The engine that answers for a model; None where the model computes by itself.

    A UserError says that there is another one than `engine`, or refuses what an engine cannot do:
    an adapter of which it cannot be given everything, several processes.
    """
    found: Engine | None = getattr(model, "engine", None)
    if (found is None) != (engine is None):
        what = f"engine={engine!r}, and the model is {'in PyTorch' if found is None else 'not'}"
        raise UserError(f"{what}; give the name of its file as the model, with engine")
    if found is None:
        return None
    if processes > 1:
        raise UserError("an engine answers to one process; start one, and give it more threads")
    if isinstance(model, PeftModel):
        _check_adapter(model)
    return found


def _check_adapter(model: PeftModel) -> None:
    kind, active = model.active_peft_config.peft_type.value, f".{model.active_adapter}."
    layers = filter(is_plain_lora, model.modules())
    plain = {id(parameter) for layer in layers for parameter in lora_parameters(layer)}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and active not in f".{name}.":
            continue
        if id(parameter) not in plain:
            raise UserError(f"an engine takes plain LORA (no DoRA or bias), not {name} of a {kind}")
        if parameter.isnan().any():
            raise UserError(f"{name} starts from weights of the base, which the engine alone has")


def states_of(base: nn.Module, lanes: Lanes | None = None) -> States:
    """The matrices of all LoRA layers: of each lane, or as they are now (a single state)."""
    lanes, states = lanes or Lanes({}, 1), {}
    for name, layer in base.named_modules():
        if isinstance(layer, LoraLayer) and layer.active_adapters:
            key = layer.active_adapters[0]
            a, b = (lanes.of(part[key].weight).detach() for part in (layer.lora_A, layer.lora_B))
            a, b = (x.expand(lanes.count, *x.shape[1:]) for x in (a, b))
            states[name] = Matrices(a, b * layer.scaling[key])
    return states


def _next_tokens(base: Any, lanes: Lanes, _: str, batch: Batch) -> Answers:
    """What follows at the N scored positions of a batch, whose rows belong to lanes in turn."""
    if "segments" in batch:
        raise UserError("an engine takes every option with a prompt of its own")
    return base.engine.answer(states_of(base, lanes), _split(rows_of(batch), lanes))


def _generate(base: Any, lanes: Lanes, _: str, **given: Any) -> Tensor:
    """As `generate` of transformers: prompts with their completions, whose rows lanes have in turn.

    A shorter completion is filled up with the token that ends it.
    """
    ids, own, config = (given[n] for n in ("input_ids", "attention_mask", "generation_config"))
    noise: CommonNoise | None = next(iter(given["logits_processor"]), None)
    prompts = [row[mask].tolist() for row, mask in zip(ids, own.bool())]
    examples, ends = len(ids) // (noise.copies if noise else 1), config.eos_token_id or []
    sampling = Sampling(noise, examples, ends, config.max_new_tokens)
    drawn = base.engine.generate(states_of(base, lanes), _split(prompts, lanes), sampling)
    filled = pad_sequence([torch.tensor(row) for row in drawn], True, (ends or [0])[0])
    return torch.cat([ids, filled], dim=1)


#: The methods of a base that its engine answers; they are told of the lanes.
ANSWERS: dict[str, Callable[..., Any]] = {"next_tokens": _next_tokens, "generate": _generate}


def _split(rows: list[Any], lanes: Lanes) -> list[list[Any]]:
    """The rows of each lane."""
    each = len(rows) // lanes.count
    return [rows[start : start + each] for start in range(0, len(rows), each)]


def rows_of(batch: Batch) -> list[Row]:
    """The sequences of a batch without padding, with the tokens that its objective scores."""
    wanted = batch["option_tokens"] if "option_tokens" in batch else batch["tokens"][:, None]
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    counts = torch.bincount(batch["rows"], minlength=len(ids)).tolist()
    positions = batch["positions"].split(counts)
    return [
        Row(row[own].tolist(), places.tolist(), tokens)
        for row, own, places, tokens in zip(ids, mask, positions, wanted.split(counts))
    ]


def _from_gguf(load: Callable[..., Any], path: Path, *chat: str | None) -> Any:
    try:
        return load(str(path.parent), *chat, gguf_file=path.name)
    except (UserError, ImportError, KeyError, NotImplementedError) as error:
        what = f"{path} does not tell transformers its configuration and its tokenizer"
        cure = "give --tokenizer_name, the folder of the model that was converted"
        raise UserError(f"{what}; {cure}") from error


def _refuse(*_: Any, **__: Any) -> Tensor:
    raise UserError("the base has no weights here: an engine answers for it")
