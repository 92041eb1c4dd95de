"""What we know of the inside of models, quantized layers and adapters still holds.

Much of it is read with a default or written without a check: were it renamed upstream, nothing
would be found, and nobody would notice. A test here fails instead, and names it.
"""

import inspect
from copy import copy
from typing import Any

import accelerate
import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_blockwise
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LNTuningConfig, LoraConfig, PeftModel, PeftType, PromptTuningConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.quantizers import AutoHfQuantizer


def tiny(model: Any = LlamaForCausalLM, **settings: Any) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=32, num_attention_heads=2, **sizes, **settings)
    return model(config).eval()


def test_layers_of_transformers() -> None:
    layer = tiny().model.layers[0]
    assert isinstance(layer, GradientCheckpointingLayer)
    assert list(inspect.signature(layer.forward).parameters)[0] == "hidden_states"
    assert tiny(attn_implementation="eager").config._attn_implementation == "eager"


def test_a_quantizer_says_what_it_did() -> None:
    settings, model = BitsAndBytesConfig(load_in_8bit=True), tiny()
    assert settings.load_in_8bit
    assert settings.__dict__["_load_in_8bit"]
    assert "bnb_4bit_use_double_quant" in settings.__dict__
    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
    quantizer.preprocess_model(model, dtype=torch.float32, device_map=None)
    quantizer.postprocess_model(model)
    assert model.is_quantized
    assert isinstance(model.model.layers[0].mlp.up_proj, Linear8bitLt)


def test_accelerate_says_where_an_offloaded_module_runs() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model[0].weight.is_meta
    assert torch.device(model[0]._hf_hook.execution_device).type == "cpu"
    model = accelerate.dispatch_model(
        nn.Sequential(nn.Linear(4, 4)), {"0": "cpu"}, force_hooks=True
    )
    assert model.hf_device_map == {"0": "cpu"}


def test_int8_codes_and_scales() -> None:
    layer = Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
    weight = layer.weight.detach().clone()
    layer.to("cpu")
    codes, scales = layer.weight.CB, layer.weight.SCB
    torch.testing.assert_close(scales, weight.abs().amax(1), rtol=1e-2, atol=0)
    layer.init_8bit_state()
    assert layer.weight.CB is None
    assert layer.state.CB is codes
    assert layer.state.SCB is scales
    # A forward with other codes, as a copy of the layer's state has them.
    state, x = copy(layer.state), torch.randn(3, 64)
    state.CB, state.is_training = -codes, False
    y = bitsandbytes.matmul(x, state.CB, bias=None, state=state)
    torch.testing.assert_close(y, x @ -weight.T, rtol=0.1, atol=0.1)
    assert "state.is_training" in inspect.getsource(bitsandbytes.autograd._functions)


def test_nf4_scales() -> None:
    layer = Linear4bit(64, 64, bias=False, quant_type="nf4", compress_statistics=True)
    largest = layer.weight.detach().abs().amax(1)
    assert layer.weight.compress_statistics
    layer.to("cpu")
    state = layer.weight.quant_state
    assert state.nested
    scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
    torch.testing.assert_close(scales, largest, rtol=2e-2, atol=0)
    state.nested, state.offset, state.state2 = False, None, None
    x, outputs = torch.randn(3, 64), []
    for state.absmax in (scales, 2 * scales):
        outputs.append(layer(x))
    torch.testing.assert_close(outputs[1], 2 * outputs[0])
    assert QuantState(scales, state2=QuantState(scales)).nested
    assert not QuantState(scales).nested
    assert "self.support_avx512bf16_for_cpu" in inspect.getsource(Linear4bit.forward)


#: What a layer of each kind of adapter has for the adapter's name.
LAYERS = {
    "lora": "lora_A lora_B scaling lora_bias",
    "vera": "vera_A vera_B vera_lambda_d vera_lambda_b",
    "unilora": "unilora_theta_d unilora_indices_A unilora_scales_A "
    "unilora_indices_B unilora_scales_B",
    "tinylora": "tinylora_v _tinylora_v_key tinylora_A tinylora_B tinylora_P",
    "ia3": "ia3_l",
}


def adapted(kind: str, **settings: Any) -> Any:
    """The first layer of an adapter of that kind."""
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)](target_modules=["q_proj"], **settings)
    modules = get_peft_model(tiny(), config).modules()
    return next(m for m in modules if isinstance(m, BaseTunerLayer) and m.active_adapters)


@pytest.mark.parametrize("method", LAYERS)
def test_layers_of_adapters(method: str) -> None:
    if method.upper() not in PEFT_TYPE_TO_CONFIG_MAPPING:
        pytest.skip(f"this version of PEFT has no {method}")
    layer = adapted(method.upper(), **({"feedforward_modules": []} if method == "ia3" else {}))
    kind = type(layer)
    assert f"{kind.__module__}.{kind.__name__}" == f"peft.tuners.{method}.layer.Linear"
    assert layer.active_adapters == ["default"]
    assert not layer.merged
    assert isinstance(layer.base_layer, nn.Linear)
    for attribute in LAYERS[method].split():
        assert "default" in getattr(layer, attribute), attribute
    if method == "tinylora":
        assert layer._tinylora_v_key["default"] in layer.tinylora_v["default"]
    if method == "ia3":
        assert not layer.is_feedforward


def test_variants_of_lora_are_told_apart() -> None:
    assert not adapted("LORA").lora_variant
    assert adapted("LORA", use_dora=True).lora_variant
    assert LoraConfig.__dataclass_fields__["use_dora"].metadata["is_lora_variant"]
    assert adapted("LORA", lora_bias=True).lora_bias["default"]


def test_copies_of_modules_that_peft_trains_as_a_whole() -> None:
    model = get_peft_model(
        tiny(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    (wrapper,) = (m for m in model.modules() if isinstance(m, ModulesToSaveWrapper))
    assert isinstance(wrapper.modules_to_save["default"], nn.Linear)
    model = get_peft_model(tiny(), LNTuningConfig(target_modules=["input_layernorm"]))
    layer = next(m for m in model.modules() if isinstance(m, LNTuningLayer))
    assert "default" in layer.ln_tuning_layers
    assert "score" in SEQ_CLS_HEAD_NAMES
    assert hasattr(tiny(LlamaForSequenceClassification), "score")


def test_prompts() -> None:
    model = get_peft_model(tiny(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert model.peft_type == PeftType.PROMPT_TUNING
    assert model.prompt_encoder[model.active_adapter].embedding.weight.shape == (3, 64)
    assert list(inspect.signature(PeftModel.get_prompt).parameters)[:2] == ["self", "batch_size"]
    model.get_prompt = lambda batch_size, **_: torch.zeros(batch_size, 5, 64)
    assert model(input_ids=torch.tensor([[1, 2]])).logits.shape == (1, 7, 32)
