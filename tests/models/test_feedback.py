"""Errors that the guide takes down through post-norm layers, against back-propagation."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import BASES, LAYERS, MODEL, PAD, VOCABULARY, WIDTH, bert, llama, opt
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertPreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from zo_peft.core.batch import Batch
from zo_peft.models.adapters import prepare, tuned_parameters
from zo_peft.models.feedback import Feedback
from zo_peft.models.guide import ResidualGuide
from zo_peft.models.heads import Scored
from zo_peft.models.loading import load_base, quantization_config
from zo_peft.models.trunk import layers_of
from zo_peft.objectives.scoring import ClassificationObjective

#: Of the rows. Of 10 tokens every third is sampled, and of 4 or fewer all.
LENGTHS = [10, 3, 4, 7]


class MeanPooled(BertPreTrainedModel):
    """BERT with a linear head on the mean of its last layer over a row's tokens."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Any:
        hidden = self.bert(input_ids, attention_mask).last_hidden_state
        mask = attention_mask[..., None]
        logits = self.classifier((hidden * mask).sum(1) / mask.sum(1))
        return SequenceClassifierOutput(logits=logits)


def rows(lengths: list[int]) -> Batch:
    """Rows of these lengths, padded behind."""
    torch.manual_seed(3)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return Batch(
        {
            "input_ids": torch.randint(1, VOCABULARY, mask.shape).where(mask.bool(), PAD),
            "attention_mask": mask,
            "labels": torch.randint(3, (len(lengths),)),
        }
    )


def post_norm(kind: Any = BertForSequenceClassification, **settings: Any) -> Any:
    """A BERT whose attention writes nothing above the lowest layer."""
    torch.manual_seed(6)
    base = bert(kind, num_labels=3, **{"intermediate_size": 2 * WIDTH, **settings})
    for name, parameter in base.named_parameters():
        nn.init.normal_(parameter, 1.0 if "LayerNorm.weight" in name else 0.0, 0.2)
        if "attention.output.dense" in name and ".0." not in name:
            nn.init.zeros_(parameter)
    return base


def adapted(base: Any) -> PeftModel:
    config = LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["value"])
    torch.manual_seed(4)
    model = get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "silu"])
@pytest.mark.parametrize("kind", [MeanPooled, BertForSequenceClassification])
def test_the_error_is_that_of_back_propagation(kind: Any, act: str) -> None:
    model, given = adapted(post_norm(kind, hidden_act=act)), rows(LENGTHS)
    scored, layers = Scored(given), layers_of(model)
    outputs: dict[nn.Module, Tensor] = {}
    for layer in layers:
        for module in (layer.attention.output.dense, layer.output.dense, layer):
            module.requires_grad_()
            module.register_forward_hook(lambda module, _, y: outputs.update({module: y}))
    known: dict[nn.Module, Any] = {}
    feedback = Feedback(scored, known)
    with feedback.hooks(layers):
        loss = ClassificationObjective().losses(model, given).mean()
    assert all(known[layer] for layer in layers)
    true = dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values()))))
    errors_at = feedback.down(scored.errors(true[layers[-1]]))
    sampled = [[0, 3, 5, 8], range(3), range(4), [0, 2, 4, 6]]
    modules = list(true.keys() - set(layers))
    for module, found in zip(modules, errors_at(modules)):
        for own, wanted, some in zip(found, true[module], sampled):
            assert wanted[some].norm() > 0
            assert (own[some] - wanted[some]).norm() <= 1e-3 * wanted[some].norm()


@pytest.mark.parametrize("base", ["float32", "bfloat16", "int8", "nf4"])
def test_b_of_values_gets_its_gradient_on_every_base(base: str, tmp_path: Any) -> None:
    post_norm().save_pretrained(tmp_path)
    settings = BASES[base]
    if base in ("int8", "nf4"):
        quantized = quantization_config(base == "int8", base == "nf4", has_classes=True)
        settings = {"quantization_config": quantized}
    model = load_base(str(tmp_path), num_labels=3, **settings)
    prepare(model, AutoTokenizer.from_pretrained(MODEL))
    model, given, objective = adapted(model), rows(LENGTHS), ClassificationObjective()
    guide = ResidualGuide(model, tuned_parameters(model), objective)
    first, second = (guide.read(given)[1][0] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)

    same = load_base(str(tmp_path), num_labels=3, **settings)
    same = same.dequantize(torch.float32) if base in ("int8", "nf4") else same.float()
    same = adapted(same)
    objective.losses(same, given).mean().backward()
    true = {name: p.grad for name, p in tuned_parameters(same).items()}
    names = [name for name in first if ".layer.0." in name and "lora_B" in name]
    names += [name for name in first if "classifier" in name]
    assert len(names) == 3
    # An int8 layer rounds its input, and bfloat16 everything.
    error = {"float32": 1e-3, "nf4": 1e-3}.get(base, 5e-2)
    for name in names:
        assert (first[name] - true[name]).norm() <= error * true[name].norm(), name


def test_other_layers_and_many_different_errors_leave_the_identity() -> None:
    given = rows(LENGTHS)
    errors = torch.randn(len(LENGTHS), max(LENGTHS), WIDTH)
    for base in (model.eval() for model in (llama(), opt(), post_norm())):
        layers = layers_of(base)
        known: dict[nn.Module, Any] = {}
        feedback = Feedback(Scored(given), known)
        with feedback.hooks(layers), torch.no_grad():
            base(input_ids=given["input_ids"], attention_mask=given["attention_mask"])
        assert len(known) == LAYERS
        assert all(known.values()) == (base.config.model_type == "bert")
        errors_at = feedback.down(errors)
        assert all(torch.equal(errors_at([module])[0], errors) for module in base.modules())
