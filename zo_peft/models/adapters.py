"""Adapters: how one is made, also on a base that accelerate offloads, loaded, and merged."""

import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftConfig, PeftModel, PeftType, PromptTuningConfig, TaskType
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME, SEQ_CLS_HEAD_NAMES
from peft.utils.other import ModulesToSaveWrapper
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zo_peft.errors import Notice, UserError, explained
from zo_peft.models.hub import LOAD_ERRORS, AnyModel, file_of, public_name, reason
from zo_peft.models.loading import check_4bit_widths, load_config
from zo_peft.models.peft_layers import check_options
from zo_peft.models.quantized import Linear4bit

#: The adapters that leave it to the layers of the base to read its weights.
ON_OFFLOADED = ["LORA", "ADALORA", "IA3", "VERA", "LOHA", "LOKR", "OFT", "BOFT", "FOURIERFT"]
ON_OFFLOADED += ["RANDLORA", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"]

#: The last layer of a head for sequence classification.
HEAD = re.compile(rf"\b({'|'.join(SEQ_CLS_HEAD_NAMES)})(\.out_proj)?\.weight$")


def add_adapter(model: PreTrainedModel, peft_config: PeftConfig) -> PeftModel:
    """A new adapter as `peft.get_peft_model` makes it; a UserError if it does not fit the base."""
    kind, offloaded = peft_config.peft_type.value, offloaded_parameters(model)
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        advice = "load the base again, or give the PeftModel and no peft_config"
        raise UserError(f"{type(model).__name__} already has layers of an adapter; {advice}")
    start = str(getattr(peft_config, "init_lora_weights", None))
    if "_niter_" in start:
        why = "changes the base by random numbers, which loading the adapter draws anew"
        raise UserError(f"init_lora_weights={start!r} {why}; use 'pissa'")
    if offloaded and kind not in ON_OFFLOADED:
        why = f"{kind} may read weights outside of their layers, and part of the base is offloaded"
        raise UserError(f"{why}; use one of {', '.join(ON_OFFLOADED)}")
    modules = dict(model.named_modules())
    linear = {n.rpartition(".")[2] for n, m in modules.items() if isinstance(m, nn.Linear)}
    known = ", ".join(sorted(linear)) or "none"
    advice = f"its linear layers are: {known}; name some as target_modules"
    given = getattr(peft_config, "target_modules", None)
    what = f"{kind} cannot be attached to {type(model).__name__}"
    with explained(what, Exception, advice=advice):
        for target in given if isinstance(given, set | list) else ():
            # PEFT is content with one name that fits.
            if not any(f".{name}".endswith(f".{target}") for name in modules):
                raise ValueError(f"no module is named {target}")
        # PEFT fills default target modules into the configuration that it is given.
        with stand_ins(offloaded):
            adapted = peft.get_peft_model(model, deepcopy(peft_config))
    config = adapted.active_peft_config
    if kind == "IA3" and isinstance(config.target_modules, set):
        # PEFT's default names modules that are no targets, and then refuses to load what it saved.
        config.feedforward_modules = config.target_modules.intersection(config.feedforward_modules)
    for name, parameter in adapted.named_parameters() if offloaded else ():
        if parameter.requires_grad and (parameter.is_meta or parameter.isnan().any()):
            advice = "keep them on a device (device_map), or start without them, as a plain LORA"
            raise UserError(f"{name} starts from weights that are offloaded; {advice}")
    check_options(adapted)
    return adapted


def offloaded_parameters(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """The offloaded parameters: of each its module, its name in that module, and itself."""
    return [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_meta and hasattr(module, "_hf_hook")
    ]


@contextmanager
def stand_ins(offloaded: Sequence[tuple[nn.Module, str, nn.Parameter]]) -> Iterator[None]:
    """Within the context, offloaded weights are NaN tensors on the devices that run their layers.

    PEFT puts an adapter on the device of the weight, and an offloaded weight has none. An adapter
    that PEFT computes from such a weight is NaN, too. One expanded number takes no memory.
    """
    try:
        for module, name, parameter in offloaded:
            hook: Any = module._hf_hook
            value = torch.nan if parameter.is_floating_point() else 0
            one = torch.full((1,), value, dtype=parameter.dtype, device=hook.execution_device)
            stand_in = nn.Parameter(one.expand(parameter.shape), requires_grad=False)
            module.register_parameter(name, stand_in)
        yield
    finally:
        for module, name, parameter in offloaded:
            parameter.requires_grad_(getattr(module, name).requires_grad)
            module.register_parameter(name, parameter)


def load_adapter(model: PreTrainedModel, path: str, is_trainable: bool = False) -> PeftModel:
    """Put an adapter (safetensors of a folder or the Hub) on its base, or a UserError says why."""
    # Without safetensors, PEFT would read a pickle.
    config, _ = saved_adapter(path)
    with reading_adapter(path):
        # The name of the base is that of the one that is here.
        config.base_model_name_or_path, config.inference_mode = None, not is_trainable
        adapted = add_adapter(model, _tunable(config) if is_trainable else config)
        wanted = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
        if any(parameter.is_meta for parameter in model.parameters()):
            # PEFT's own loading would offload the adapter as well.
            weights = peft.load_peft_weights(path)
            lacking = sorted(wanted - weights.keys())
            foreign = peft.set_peft_model_state_dict(adapted, weights).unexpected_keys
        else:
            mapping = getattr(model, "_checkpoint_conversion_mapping", None)
            keys = adapted.load_adapter(path, "default", is_trainable, key_mapping=mapping)
            shared = ("vblora_vector_bank", "prompt_encoder")
            lacking = [key for key in keys.missing_keys if not any(name in key for name in shared)]
            foreign = keys.unexpected_keys
        if lacking:
            raise ValueError(f"it lacks {lacking[0]}.")
        if strange := sorted(set(foreign) - wanted):
            raise ValueError(f"it has {strange[0]}, for which this base has no place.")
        return adapted


def _tunable(config: PeftConfig) -> PeftConfig:
    """A configuration with which a saved adapter can be tuned further.

    Of a prompt or a prefix, PEFT saves what the network that makes it gives, so this is what is
    tuned then. Other adapters that only PEFT's inference mode can load stay in it.
    """
    if config.peft_type in (PeftType.PROMPT_TUNING, PeftType.P_TUNING):
        tokens = config.num_virtual_tokens
        return PromptTuningConfig(task_type=config.task_type, num_virtual_tokens=tokens)
    if config.peft_type == PeftType.PREFIX_TUNING:
        config.prefix_projection = False
    else:
        config.inference_mode = config.is_prompt_learning
    return config


def save_adapter(model: PeftModel, folder: str) -> None:
    """Save the active adapter into a folder in PEFT's layout, whatever it is called.

    Beside an adapter the base is never written, so its embeddings need no saving, unless they have
    another size than those of the base that an adapter is loaded on.
    """
    name, active = model.config.name_or_path, model.active_adapter
    rows = None
    if name:
        with suppress(UserError):
            rows = getattr(load_config(name).get_text_config(), "vocab_size", None)
    resized = rows not in (None, vocabulary(model) or rows)
    model.save_pretrained(folder, selected_adapters=[active], save_embedding_layers=resized)
    if active != "default":
        # PEFT gives it a folder of its own, in which nobody looks for it.
        for path in (Path(folder) / active).iterdir():
            path.replace(Path(folder) / path.name)
        (Path(folder) / active).rmdir()


@contextmanager
def reading_adapter(path: str) -> Iterator[None]:
    """Within the context, a UserError says why an adapter cannot be loaded."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (*LOAD_ERRORS, KeyError, TypeError, RuntimeError) as error:
        missing = f"{error} is missing, or unknown to this version of PEFT."
        why = missing if isinstance(error, KeyError) else reason(error)
        layout = "(adapter_config.json, adapter_model.safetensors), a folder or a Hub id"
        advice = f"Give an adapter for this base in PEFT's layout {layout}"
        raise UserError(f"adapter {path!r} cannot be loaded: {why} {advice}") from error


def saved_adapter(name: str) -> tuple[PeftConfig, int | None]:
    """An adapter's configuration, and how many classes its head has, if any; or a UserError."""
    with reading_adapter(name):
        config = PeftConfig.from_pretrained(name)
        with safe_open(file_of(name, SAFETENSORS_WEIGHTS_NAME), "pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    heads = [shape[0] for key, shape in shapes.items() if HEAD.search(key)]
    return config, heads[0] if heads and config.task_type == TaskType.SEQ_CLS else None


@torch.no_grad()
def merged_model(model: PeftModel) -> PreTrainedModel:
    """Return the base of a model; its weights are changed in place by the adapter.

    A UserError says that PEFT cannot merge this kind of adapter, that a weight has a second use
    (tied embeddings), or that a merged weight would not be finite.
    """
    kind = model.active_peft_config.peft_type.value
    layers = [m.get_base_layer() for m in model.modules() if isinstance(m, BaseTunerLayer)]
    dtypes = {p: p.dtype for layer in layers for p in layer.parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in dtypes and ".base_layer." not in name:
            other = name.removeprefix("base_model.model.")
            why = f"it changes a weight of one layer that the base also uses as {other}"
            raise UserError(f"{kind} cannot be merged: {why}; load it with PEFT")
    # In another dtype PEFT would round the change before it adds it.
    for parameter in dtypes:
        parameter.data = parameter.data.float()
    errors = AttributeError, NotImplementedError, RuntimeError, ValueError
    with explained(f"{kind} cannot be merged", *errors, advice="load it with PEFT"):
        merged = model.merge_and_unload(safe_merge=True)
    for parameter, dtype in dtypes.items():
        parameter.data = parameter.data.to(dtype)
    return merged


def check_saved(model: PeftModel) -> None:
    """Raise a UserError for tuned parameters that share their memory, or would not be saved."""
    active = model.active_adapter
    if len(model.active_adapters) > 1:
        raise UserError("several adapters are active; choose the one to tune with set_adapter")
    state = peft.get_peft_model_state_dict(model, adapter_name=active, save_embedding_layers=False)
    saved = {tensor.data_ptr() for tensor in state.values()}
    owners: dict[int, str] = {}
    for name, parameter in tuned_parameters(model).items():
        other = owners.setdefault(parameter.data_ptr(), name)
        if other != name:
            advice = "tie no weights that are tuned (ensure_weight_tying=False)"
            raise UserError(f"{other} and {name} share their memory; {advice}")
        learned = model.active_peft_config.is_prompt_learning and name.startswith("prompt_encoder.")
        if parameter.data_ptr() not in saved and not learned:
            why = f"{name} would be tuned, but is not saved with the adapter {active!r}"
            advice = "give a base of which no weight requires a gradient, and one adapter"
            raise UserError(f"{why}; {advice}")


def prepare(model: AnyModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make a model safe for forward-only tuning, in place.

    On a CPU, bitsandbytes is kept from repacking NF4 weights, which every `state_dict()` would then
    change. The trainable parameters of a PEFT model become float32 (PEFT leaves `modules_to_save`
    and layer norms in the base's dtype), and a local base is recorded by its folder's name, so that
    no saved file holds a path of this machine. Layers are refused as by `check_4bit_widths`.

    A tokenizer without a padding token pads with the end of a sequence, and the model's head is
    told which token pads. A UserError says that there is none, or that the model does not have it.
    """
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise UserError("the tokenizer has no padding token and no end of sequence; set pad_token")
    check_token(tokenizer.pad_token_id, vocabulary(model))
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = tokenizer.pad_token_id
    check_4bit_widths(model)
    for module in model.modules():
        if isinstance(module, Linear4bit) and module.weight.device.type == "cpu":
            module.support_avx512bf16_for_cpu = False
    if not isinstance(model, PeftModel):
        return
    check_saved(model)
    for config in model.peft_config.values():
        config.base_model_name_or_path = public_name(config.base_model_name_or_path)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    dtype, bias = model.get_base_model().dtype, getattr(model.active_peft_config, "bias", "none")
    if bias != "none" and dtype != torch.float32:
        # Layers fail on a float32 bias, or replace it by a rounded one, which nothing would tune.
        advice = "load it with dtype='float32', or tune no biases (bias='none')"
        raise UserError(f"bias={bias!r} is tuned in float32, and the base is in {dtype}; {advice}")
    for name, module in model.named_modules():
        # These hold float32 copies of base modules, whose inputs and outputs PEFT does not cast.
        if isinstance(module, ModulesToSaveWrapper):
            copies = module.modules_to_save
        elif isinstance(module, LNTuningLayer):
            copies = module.ln_tuning_layers
        else:
            continue
        for copy in copies.values():
            copy.register_forward_pre_hook(_inputs_to_float32)
            # The logits of a head stay float32, because only the loss reads them.
            if name.rpartition(".")[2] not in (*SEQ_CLS_HEAD_NAMES, "lm_head"):
                copy.register_forward_hook(lambda module, args, output: output.to(dtype))


def _inputs_to_float32(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def tuned_parameters(model: PeftModel, tunable: str | None = None) -> dict[str, nn.Parameter]:
    """The parameters that PEFT made trainable, by name, as far as they are `matching`."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    chosen = matching(trainable, tunable)
    return {name: p for name, p in trainable.items() if name in chosen}


def matching(names: Collection[str], tunable: str | None) -> set[str]:
    """The names in which `tunable`, a regular expression, is found; all names for None.

    A UserError says that it is no regular expression, or is found in no name.
    """
    if tunable is None:
        return set(names)
    with explained(f"tunable={tunable!r} is not a regular expression", re.error):
        chosen = {name for name in names if re.search(tunable, name)}
    if not chosen:
        known = f"the {len(names)} trainable parameters, e.g. {next(iter(names), 'none')}"
        raise UserError(f"tunable={tunable!r} matches none of {known}")
    return chosen


@torch.no_grad()
def start_prefix_from_tokens(model: PeftModel, token_ids: Tensor) -> None:
    """Set a prefix to the keys and values that the base computes for T real tokens, in place.

    A random prefix does not learn in this way (MeZO, arXiv:2305.17333, appendix on prefix tuning);
    that of an encoder stays random, with a warning, because encoders give no keys and values.
    """
    config: Any = model.active_peft_config
    base = model.get_base_model()
    output = base(input_ids=token_ids[None].to(input_device(base)), use_cache=True)
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        warnings.warn(f"{name_of(model)} starts from a random prefix", Notice, stacklevel=2)
        return
    heads, width = config.num_attention_heads, config.token_dim // config.num_attention_heads
    weight = model.prompt_encoder[model.active_adapter].embedding.weight
    prefix = weight.view(len(token_ids), config.num_layers, 2, heads, width)
    for layer, (keys, values, *_) in enumerate(cache):
        prefix[:, layer, 0] = keys[0].transpose(0, 1)
        prefix[:, layer, 1] = values[0].transpose(0, 1)


def input_device(model: AnyModel) -> torch.device:
    """The device of token ids; for an offloaded model the CPU, from which accelerate moves them."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


def name_of(model: AnyModel) -> str:
    """What a user calls the model: its class, and the type of its adapter."""
    if (config := peft_config_of(model)) is None:
        return type(model).__name__
    return f"{type(model.get_base_model()).__name__} with {config.peft_type.value}"


def running(model: AnyModel) -> AbstractContextManager[None]:
    """Within the context, what a first forward raises becomes a UserError that names the model.

    PEFT attaches adapters to modules that they cannot work in, and some need inputs of their own.
    """
    advice = "choose other target_modules, another peft_type or another base"
    return explained(f"{name_of(model)} does not run on text alone", Exception, advice=advice)


def peft_config_of(model: AnyModel) -> PeftConfig | None:
    """The configuration of the active adapter; None without one."""
    return model.active_peft_config if isinstance(model, PeftModel) else None


def classifies(model: AnyModel) -> bool:
    """Whether the model has a head for sequence classification instead of one for tokens."""
    if (config := peft_config_of(model)) is None:
        return model.get_output_embeddings() is None
    return config.task_type == TaskType.SEQ_CLS


def context_length(model: AnyModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The most tokens of an example: positions less virtual tokens. None: the model has no most."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None or positions < 1:  # XLNet says -1
        return None
    for name, module in model.named_modules():
        # Models of RoBERTa's kind count positions from behind that of the padding.
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            positions = min(positions, module.num_embeddings - padding - 1)
    virtual = getattr(peft_config_of(model), "num_virtual_tokens", None)
    if virtual is not None and not 0 < virtual < positions:
        raise UserError(f"num_virtual_tokens={virtual}; give 1 or more, and below {positions}")
    return min(positions, tokenizer.model_max_length) - (virtual or 0)


def vocabulary(model: AnyModel) -> int | None:
    """How many token ids the model's embedding has rows for; None: it has no such embedding."""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:  # Canine hashes characters
        return None
    with running(model):  # PEFT computes the weight of trainable tokens
        weight = getattr(embedding, "weight", None)
    return None if weight is None else weight.shape[0]


def check_token(token: int, rows: int | None) -> None:
    """Raise a UserError for a token id that an embedding of so many rows does not have."""
    if token < 0 or (rows is not None and token >= rows):
        advice = "use the model's own tokenizer and tokens, or call resize_token_embeddings"
        raise UserError(f"token id {token} is beyond the {rows} rows of the embedding; {advice}")
