"""Base models (in floating point, int8 or NF4) and tokenizers, and how a base is recognised."""

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from safetensors import safe_open
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers import AutoHfQuantizer

from zo_peft.errors import Notice, UserError, explained, first_line
from zo_peft.models.hub import LOAD_ERRORS, AnyModel, file_of, public_name, reason
from zo_peft.models.quantized import Linear4bit, Linear8bitLt, QuantState, bitsandbytes

CHATML = Path(__file__).with_name("chatml.jinja")


def quantization_config(
    load_in_8bit: bool,
    load_in_4bit: bool,
    compute_dtype: torch.dtype | str = torch.float32,
    has_classes: bool = False,
) -> BitsAndBytesConfig | None:
    """The settings of LLM.int8() or NF4; None for a base in floating point.

    With `has_classes` there is a head for classification. It is new, so it is not quantized.
    """
    if load_in_8bit and load_in_4bit:
        raise UserError("load_in_8bit and load_in_4bit exclude each other; choose one")
    if not (load_in_8bit or load_in_4bit):
        return None
    skipped = list(SEQ_CLS_HEAD_NAMES) if has_classes else None
    if load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": compute_dtype}
    return BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skipped, **nf4)


def quantization_of(config: PreTrainedConfig) -> dict[str, Any]:
    """How a model is quantized, in the words of its config.json; empty in floating point."""
    return config.to_dict().get("quantization_config") or {}


def bits_of(config: PreTrainedConfig) -> Literal[8, 4] | None:
    """The bits of the weights that bitsandbytes quantizes; None where it quantizes none."""
    settings = quantization_of(config)
    return 8 if settings.get("load_in_8bit") else 4 if settings.get("load_in_4bit") else None


def load_base(
    name: str,
    num_labels: int | None = None,
    tune: str = "adapter",
    words: Sequence[str] = (),
    **kwargs: Any,
) -> PreTrainedModel:
    """The base of this name (a Hub id or a folder), read from safetensors, or a UserError.

    With `num_labels` it has a head for so many classes, whose names are `words`, or keeps its own
    for as many or more; else it is a causal language model. `check_bits` looks at the configuration
    before weights are read. `kwargs` are arguments of `from_pretrained`.
    """
    source = {n: kwargs[n] for n in ("revision", "trust_remote_code") if n in kwargs}
    if tune != "adapter":
        config = load_config(name, **source)
        if quantization := kwargs.get("quantization_config"):
            config.quantization_config = quantization
        check_bits(bits_of(config), bool(quantization_of(config)), config.name_or_path, tune)
    head = {} if num_labels is None else _head(load_config(name, **source), num_labels, words)
    auto = AutoModelForCausalLM if num_labels is None else AutoModelForSequenceClassification
    with _loading(f"model {name!r}"):
        model = auto.from_pretrained(name, **{"use_safetensors": True, **head, **kwargs})
    if hasattr(model, "ct_decompress_hook"):
        # Otherwise the first forward unpacks the weights, when PEFT has looked for them in vain.
        model.hf_quantizer.compressor.decompress_model(model)
    return model


def _head(config: PreTrainedConfig, num_labels: int, words: Sequence[str]) -> dict[str, Any]:
    """The settings of a new head for classes; none where the base has a head that fits."""
    name = public_name(config.name_or_path)
    if any("ForSequenceClassification" in kind for kind in config.architectures or ()):
        if num_labels > config.num_labels:
            why = f"the head of {name} has {config.num_labels} classes, and there are {num_labels}"
            raise UserError(f"{why}; correct the labels, or give a base without a head")
        own = [str(config.id2label[index]).lower() for index in range(config.num_labels)]
        if (other := [word.lower() for word in words]) != own and sorted(other) == sorted(own):
            right = ",".join(own)
            raise UserError(f"{name} has its classes in another order; give --label_words {right}")
        return {}
    if num_labels < 2:
        why = f"{name} has no head for classes, and the labels name {num_labels} of them"
        advice = "give all --label_words, two or more, to train one, or an adapter with it"
        raise UserError(f"{why}; {advice}")
    if len(words) != num_labels:
        return {"num_labels": num_labels}
    index = {word: index for index, word in enumerate(words)}
    return {"num_labels": num_labels, "id2label": dict(enumerate(words)), "label2id": index}


def check_4bit_widths(model: PreTrainedModel, device: str = "cpu") -> None:
    """Raise a UserError for a 4-bit layer on a CPU whose rows are not whole quantization blocks.

    On CPUs with AVX-512, bitsandbytes 0.50 decodes such a layer to wrong weights. It is refused on
    every CPU, so that whether a run works does not depend on the kind of CPU. With `device` meta
    the model stands for one on a CPU.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, Linear4bit) or layer.weight.device.type != device:
            continue
        width, block = layer.in_features, layer.weight.blocksize
        if width % block:
            why = f"{name} has {width} input features, no multiple of its block size, {block}, and"
            advice = "load the base in 8 bit or in floating point, or use a GPU"
            raise UserError(f"{why} some CPUs decode such 4-bit layers wrongly; {advice}")


def load_config(name: str, **kwargs: Any) -> PreTrainedConfig:
    """The configuration of the model of this name (a Hub id or a folder), or a UserError."""
    with _loading(f"model {name!r}"):
        return AutoConfig.from_pretrained(name, **kwargs)


def load_tokenizer(
    name: str, template: str | None = None, adapter: str | None = None, **kwargs: Any
) -> PreTrainedTokenizerBase:
    """The tokenizer of this name, or a UserError.

    `template` is a Jinja file, or `chatml`; None: that of the adapter, else the tokenizer's own.
    """
    with _loading(f"the tokenizer of {name!r}"):
        tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
    file = CHATML if template == "chatml" else Path(template) if template else None
    if file is None and adapter is not None:
        with suppress(*LOAD_ERRORS):
            file = file_of(adapter, "chat_template.jinja")
    what, advice = f"the chat template {template or file}", "give a Jinja file, or chatml"
    with explained(f"{what} cannot be read", OSError, ValueError, advice=advice):
        if file is not None:
            tokenizer.chat_template = file.read_text(encoding="utf-8")
    return tokenizer


@contextmanager
def _loading(what: str) -> Iterator[None]:
    """Within the context, errors of loading become a UserError that names `what`."""
    try:
        yield
    except LOAD_ERRORS as error:
        # Users of the command line know no `use_safetensors`.
        why = reason(error).partition(" and thus cannot be loaded with `safetensors`")[0]
        advice = "Give a folder that holds config.json and safetensors, or a model id of the Hub"
        raise UserError(f"{what} cannot be loaded: {why.rstrip('.')}. {advice}") from error
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, ImportError, RuntimeError) as error:
        # A quantization lacks its package or its device, weights do not fit their model, or
        # device_map names a GPU (PyTorch asserts that it was built with CUDA).
        why = first_line(error)
        if "ignore_mismatched_sizes" in why:
            why = "its weights have other shapes than its config.json says; give those of one model"
        if bitsandbytes is None and "bitsandbytes" in why:
            why = 'int8 and NF4 need bitsandbytes; pip install "zo_peft[quantized]" brings it'
        raise UserError(f"{what} cannot be loaded: {why}") from error


def meta_base(
    name: str,
    dtype: str,
    quantization: BitsAndBytesConfig | Literal[False] | None,
    has_classes: bool,
    **source: Any,
) -> PreTrainedModel:
    """The base as `load_base` would load it, on the meta device: its tensors hold no bytes.

    A UserError refuses one that was quantized by others than bitsandbytes. `dtype` is that of what
    is not quantized (auto: as it was saved). With a `quantization` of None it is as it was saved,
    with False not quantized. `source` is `revision` and `trust_remote_code`.
    """
    config = load_config(name, **source)
    saved = quantization_of(config)
    method = saved.get("quant_method", "bitsandbytes")
    if not method.startswith("bitsandbytes"):
        advice = "give its base in floating point, or one that bitsandbytes quantized"
        raise UserError(f"{public_name(name)}, quantized by {method}, is not planned; {advice}")
    auto = AutoModelForSequenceClassification if has_classes else AutoModelForCausalLM
    settings = {"dtype": (config.dtype or "float32") if dtype == "auto" else dtype}
    settings["trust_remote_code"] = source.get("trust_remote_code", False)
    with _loading(f"model {name!r}"), torch.device("meta"):
        base = auto.from_config(config, **settings)
        if quantization or (saved and quantization is None):
            if bitsandbytes is None:
                raise ImportError("bitsandbytes is not installed")
            _quantize(base, quantization or saved)
    return base.requires_grad_(False)


def _quantize(base: PreTrainedModel, quantization: BitsAndBytesConfig | dict[str, Any]) -> None:
    """Quantize a base on the meta device in place, as `from_pretrained` does."""
    # With `pre_quantized` the new layers hold codes, not numbers that are still to be quantized.
    quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=True)
    base.config.quantization_config = quantizer.quantization_config
    quantizer.preprocess_model(base, dtype=base.dtype, device_map=None)
    quantizer.postprocess_model(base)
    base.tie_weights()
    for layer in base.modules():
        if isinstance(layer, Linear8bitLt | Linear4bit) and layer.bias is not None:
            layer.bias.data = layer.bias.data.to(base.dtype)
        if isinstance(layer, Linear8bitLt):
            layer.state.SCB = torch.empty(layer.out_features)
        elif isinstance(layer, Linear4bit):
            count = layer.in_features * layer.out_features
            layer.weight.data = torch.empty(count // 2, 1, dtype=torch.uint8)
            layer.weight.quant_state = _scales(count // 64, layer.weight.compress_statistics)


def _scales(count: int, nested: bool) -> QuantState:
    """So many scales of NF4 weights; nested ones are quantized to 8 bits in blocks of 256."""
    if not nested:
        return QuantState(torch.empty(count))
    outer, code = torch.empty(count // 256), torch.empty(256)
    outer_state = QuantState(outer, code=code, blocksize=256, dtype=torch.float32)
    codes = torch.empty(count, dtype=torch.uint8)
    return QuantState(codes, offset=torch.empty(()), state2=outer_state)


def bits_in(model: nn.Module) -> Literal[8, 4] | None:
    """The bits of the layers that bitsandbytes has quantized, whatever the configuration says."""
    kinds = {type(module) for module in model.modules()}
    return 4 if Linear4bit in kinds else 8 if Linear8bitLt in kinds else None


def is_packed(model: nn.Module) -> bool:
    """Whether some parameters are codes or floats of 8 bits, or packed in such tensors."""
    dtypes = {part.dtype for tensor in model.parameters() for part in plain_tensors(tensor)}
    return any(not dtype.is_floating_point or dtype.itemsize == 1 for dtype in dtypes)


def check_bits(bits: Literal[8, 4] | None, quantized: bool, name: str, tune: str) -> None:
    """Raise a UserError where what bitsandbytes, or another, did to a base bars tuning it."""
    name = public_name(name)
    if quantized and bits is None:
        why = f"tune={tune!r} is for bases in floating point and those of bitsandbytes"
        raise UserError(f"{why}, and {name} is quantized in another way; tune an adapter")
    if tune == "weights" and bits == 4:
        advice = "load it in 8 bit or unquantized, or use tune='scales'"
        raise UserError(f"tune='weights' cannot move the codes of a 4-bit base; {advice}")
    if tune == "scales" and bits is None:
        advice = "use load_in_8bit or load_in_4bit, or tune='weights'"
        raise UserError(f"tune='scales' needs a quantized base, and {name} is not; {advice}")


def base_hash(model: nn.Module) -> str:
    """A hash of names and bits of the state dict's tensors, without an adapter's trained ones."""
    digest = hashlib.blake2b(digest_size=16)
    named = model.named_parameters() if isinstance(model, PeftModel) else ()
    trained = {name for name, parameter in named if parameter.requires_grad}
    for name, tensor in sorted(model.state_dict().items()):
        if name in trained:
            continue
        for part in plain_tensors(tensor):
            digest.update(f"{name} {part.dtype} {list(part.shape)}".encode())
            digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def plain_tensors(tensor: Any) -> Iterator[torch.Tensor]:
    """The plain tensors of a parameter or an entry of a state dict; packed ones have several."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(tensor, name))
    elif isinstance(tensor, torch.Tensor):
        yield tensor


def identity(model: AnyModel) -> dict[str, str]:
    """A hash of the base's files, or of its tensors if it is of the Hub; and its format.

    Of a base for which an inference engine answers, the engine knows it (`zo_peft.engines`).
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if hasattr(base, "engine"):
        return base.engine.identity
    bits = bits_of(base.config)
    loaded = {8: "int8", 4: "4-bit"}[bits] if bits else str(base.dtype)
    name = model.config.name_or_path
    files = sorted(Path(name).glob("*.safetensors")) if name else []
    if edited := _edited(model, files) if isinstance(model, PeftModel) else None:
        why = f"{edited} is not as in {public_name(name)}: the adapter fits the base as it is here"
        warnings.warn(f"{why}; save the base, too, and load it from there", Notice, stacklevel=2)
    # What others quantize while they load it has no file of its own.
    if edited or not files or (not bits and is_packed(base)):
        return {"tensors": base_hash(model), "loaded": loaded}
    return {"files": files_hash(files), "loaded": loaded}


def _edited(model: PeftModel, files: Iterable[Path]) -> str | None:
    """A tensor of the base of which the first row is not that of its files; None without one."""
    start = getattr(model.active_peft_config, "init_lora_weights", None)
    keeps = start in (True, False, "gaussian", "orthogonal", "eva")  # others change the base
    named = model.get_base_model().named_parameters()
    floats = ((n, p.detach()) for n, p in named if p.is_floating_point() and not p.requires_grad)
    own = {n.replace(".base_layer.", "."): p for n, p in floats if p.dim() and not p.is_meta}
    for path in files if keeps else ():
        with safe_open(path, "pt") as file:
            for name in sorted(own.keys() & {*file.keys()}):
                mine, row = own[name][:1].cpu(), file.get_slice(name)[:1]
                if mine.shape == row.shape and not torch.equal(row.to(mine.dtype), mine):
                    return name
    return None


def files_hash(files: Iterable[Path]) -> str:
    """A hash of what the files hold, one after the other."""
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        own = hashlib.blake2b()
        with path.open("rb") as file:
            for part in iter(lambda: file.read(2**20), b""):
                own.update(part)
        digest.update(own.digest())
    return digest.hexdigest()
