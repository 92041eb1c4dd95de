"""Objectives against transformers' own loss, numpy on full logits, and back-propagation."""

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from tiny import PAD, VOCABULARY, bert, gpt2, llama, noise_block, opt
from torch import Tensor, nn
from transformers import (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput

from zo_peft import Direction
from zo_peft.core.flat_space import FlatSpace
from zo_peft.core.strategies import mezo, run_step
from zo_peft.data import Collator
from zo_peft.models.adapters import tuned_parameters
from zo_peft.models.recipe import evaluator_of
from zo_peft.objectives.scoring import ClassificationObjective, CompletionObjective, OptionObjective

SMALL = {"num_hidden_layers": 2, "initializer_range": 0.15}


class WithoutHeadModule(LlamaForCausalLM):
    """A language model that applies its head without calling the module."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> CausalLMOutput:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        return CausalLMOutput(logits=F.linear(hidden, self.lm_head.weight))


FAMILIES = {
    "llama": lambda: llama(**SMALL),
    "opt": lambda: opt(num_hidden_layers=2, init_std=0.15),
    "gpt2": lambda: gpt2(**SMALL),
}
ADAPTERS: dict[str, PeftConfig | None] = {
    "none": None,
    "lora": LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}
MODELS = [(family, adapter) for family in FAMILIES for adapter in ADAPTERS]


def make(family: str, adapter: str = "none") -> PreTrainedModel | PeftModel:
    torch.manual_seed(0)
    base, config = FAMILIES[family]().eval(), deepcopy(ADAPTERS[adapter])
    return base if config is None else get_peft_model(base, config).eval()


def tokens(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCABULARY, count).tolist()


COMPLETIONS = [
    {"input_ids": tokens(n, n), "labels": [-100] * k + tokens(n, n)[k:]}
    for n, k in ((9, 6), (4, 3), (13, 1), (2, 1), (7, 6))
]
# The loss of a chat turn may also stop before the end, and skip tokens between.
COMPLETIONS.append({"input_ids": tokens(6, 1), "labels": [-100, 3, -100, -100, 5, -100]})

ONE_TOKEN = [
    {"prompt_ids": tokens(n, n), "option_ids": [[7], [11]], "label": label}
    for n, label in ((5, 0), (1, 1), (8, 1))
]
RAGGED = [
    {"prompt_ids": tokens(6, 0), "option_ids": [[7], [11, 12], [13, 14, 15]], "label": 2},
    {"prompt_ids": tokens(3, 1), "option_ids": [[20, 21], [22]], "label": 0},
    {"prompt_ids": tokens(1, 2), "option_ids": [[9, 9, 9, 9]], "label": 0},
    {"prompt_ids": tokens(9, 3), "option_ids": [[7], [11], [12], [13]], "label": 3},
]


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@torch.no_grad()
def next_token_log_probs(model: nn.Module, ids: list[int]) -> NDArray[np.float64]:
    """Of one unpadded sequence, from full logits [L, V]; without an adapter's virtual tokens."""
    row = torch.tensor([ids])
    logits = model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0, -len(ids) :]
    assert logits.shape == (len(ids), VOCABULARY)
    return log_softmax(logits.double().numpy())


def option_scores(model: nn.Module, example: dict[str, Any]) -> NDArray[np.float64]:
    """The mean log-likelihood of each option, one sequence at a time."""
    scores = []
    for option in example["option_ids"]:
        log_probs = next_token_log_probs(model, example["prompt_ids"] + option)
        first = len(example["prompt_ids"]) - 1
        scores.append(np.mean([log_probs[first + i, token] for i, token in enumerate(option)]))
    return np.array(scores)


@pytest.mark.parametrize(("family", "adapter"), MODELS)
def test_the_completion_loss_is_transformers_own(family: str, adapter: str) -> None:
    model = make(family, adapter)
    expected, explicit = [], []
    for example in COMPLETIONS:
        ids, labels = (torch.tensor([example[name]]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        expected.append(loss.item())
        log_probs = next_token_log_probs(model, example["input_ids"])
        scored = [(i, t) for i, t in enumerate(example["labels"][1:]) if t != -100]
        explicit.append(-np.mean([log_probs[i, t] for i, t in scored]))
    with torch.no_grad():
        losses = CompletionObjective().losses(model, Collator(PAD)(COMPLETIONS))
    assert losses.dtype == torch.float32
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(losses, explicit, rtol=1e-5, atol=1e-5)


def test_completion_predictions_are_the_likeliest_next_tokens() -> None:
    model = make("llama", "prompt")
    with torch.no_grad():
        losses, predictions, labels = CompletionObjective().predict(
            model, Collator(PAD)(COMPLETIONS)
        )
    assert predictions.shape == labels.shape == (len(COMPLETIONS), 12)
    for row, example in enumerate(COMPLETIONS):
        best = next_token_log_probs(model, example["input_ids"]).argmax(axis=-1)
        rest = [-100] * (12 - len(example["labels"][1:]))
        assert labels[row].tolist() == example["labels"][1:] + rest
        wanted = [-100 if t == -100 else best[i] for i, t in enumerate(example["labels"][1:])]
        assert predictions[row].tolist() == wanted + rest
    assert torch.equal(losses, CompletionObjective().losses(model, Collator(PAD)(COMPLETIONS)))


@pytest.mark.parametrize("features", [ONE_TOKEN, RAGGED, ONE_TOKEN + RAGGED])
@pytest.mark.parametrize(("family", "adapter"), MODELS)
def test_options_are_scored_as_one_sequence_at_a_time(
    family: str, adapter: str, features: list[dict[str, Any]]
) -> None:
    model = make(family, adapter)
    batch = Collator(PAD)(features)
    with torch.no_grad():
        scores = OptionObjective().scores(model, batch)
        losses, predictions, references = OptionObjective().predict(model, batch)
    assert torch.equal(losses, OptionObjective().losses(model, batch))
    assert scores.shape[0] == len(features)
    for row, example in enumerate(features):
        expected = option_scores(model, example)
        likelihoods = log_softmax(scores[row, : len(expected)].double().numpy())
        np.testing.assert_allclose(likelihoods, log_softmax(expected), rtol=1e-5, atol=1e-5)
        assert torch.isneginf(scores[row, len(expected) :]).all()
        loss = -log_softmax(expected)[example["label"]]
        np.testing.assert_allclose(losses[row], loss, rtol=1e-5, atol=1e-5)
        assert predictions[row] == expected.argmax()
    assert references.tolist() == [example["label"] for example in features]


@pytest.mark.parametrize(("family", "adapter"), MODELS)
def test_one_token_options_score_as_longer_ones_do(family: str, adapter: str) -> None:
    """One forward for all label words, or one row for each: the same scores."""
    model, objective = make(family, adapter), OptionObjective()
    short, long = Collator(PAD)(ONE_TOKEN), Collator(PAD)(ONE_TOKEN + RAGGED[:1])
    assert "option_tokens" in short
    assert "is_option" in long
    with torch.no_grad():
        one_forward, one_row_each = objective.scores(model, short), objective.scores(model, long)
    found, expected = one_forward.log_softmax(-1), one_row_each[:3, :2].log_softmax(-1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_any_of_the_right_options_is_right() -> None:
    """As with the entities of ReCoRD; the loss is still that of the first."""
    (family, adapter), *_ = MODELS
    model, objective = make(family, adapter), OptionObjective()
    plain = Collator(PAD)(RAGGED)
    with torch.no_grad():
        losses, chosen, labels = objective.predict(model, plain)
        for right in (True, False):
            others = [[int(option)] if right else [] for option in chosen]
            rows = [{**row, "also_right": also} for row, also in zip(RAGGED, others)]
            found = objective.predict(model, Collator(PAD)(rows))
            assert torch.equal(found[0], losses)
            assert torch.equal(found[2], labels)
            assert torch.equal(found[1], labels if right else chosen)
    assert not torch.equal(chosen, labels)


@pytest.mark.parametrize(
    ("objective", "features"),
    [
        (CompletionObjective(), COMPLETIONS),
        (OptionObjective(), ONE_TOKEN),
        (OptionObjective(), RAGGED),
    ],
    ids=["completion", "one token", "ragged"],
)
@pytest.mark.parametrize(("family", "adapter"), MODELS)
def test_padding_does_not_change_a_loss(
    family: str, adapter: str, objective: Any, features: list[dict[str, Any]]
) -> None:
    model = make(family, adapter)
    with torch.no_grad():
        together = objective.losses(model, Collator(PAD)(features))
        alone = torch.cat([objective.losses(model, Collator(PAD)([f])) for f in features])
        other_token = objective.losses(model, Collator(PAD + 9)(features))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together, other_token, rtol=1e-5, atol=1e-5)


def test_the_head_sees_the_labelled_positions_only() -> None:
    model, seen = make("llama", "prompt"), []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    CompletionObjective().losses(model, Collator(PAD)(COMPLETIONS))
    scored = sum(label != -100 for f in COMPLETIONS for label in f["labels"][1:])
    OptionObjective().losses(model, Collator(PAD)(ONE_TOKEN))
    assert seen == [(scored, VOCABULARY), (len(ONE_TOKEN), VOCABULARY)]
    ids = torch.tensor([[5, 6, 7]])
    # Afterwards the head is as it was, also when the model raises.
    batch = Collator(PAD)(COMPLETIONS)
    with pytest.raises(IndexError):
        CompletionObjective().losses(model, batch | {"input_ids": batch["input_ids"] + VOCABULARY})
    assert model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.shape[1] == 3 + 3


def test_a_head_that_is_no_module_call_gives_the_same() -> None:
    ordinary = make("llama")
    other = llama(WithoutHeadModule, **SMALL).eval()
    other.load_state_dict(ordinary.state_dict())
    for objective, features in (
        (CompletionObjective(), COMPLETIONS),
        (OptionObjective(), ONE_TOKEN),
        (OptionObjective(), RAGGED),
    ):
        batch = Collator(PAD)(features)
        with torch.no_grad():
            expected, found = (objective.losses(model, batch) for model in (ordinary, other))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_float32_whatever_the_model(dtype: torch.dtype) -> None:
    exact, model = make("llama"), make("llama").to(dtype)
    with torch.no_grad():
        losses = OptionObjective().losses(model, Collator(PAD)(RAGGED))
        expected = OptionObjective().losses(exact, Collator(PAD)(RAGGED))
    assert losses.dtype == torch.float32
    assert not torch.equal(losses, losses.to(dtype).float())
    torch.testing.assert_close(losses, expected, rtol=0.1, atol=0.1)


def bert_classifier() -> PreTrainedModel:
    return bert(num_labels=3, **SMALL)


def llama_classifier() -> PreTrainedModel:
    return llama(LlamaForSequenceClassification, num_labels=3, **SMALL)


@pytest.mark.parametrize("build", [bert_classifier, llama_classifier])
def test_classification_is_the_cross_entropy_of_the_models_head(build: Any) -> None:
    torch.manual_seed(0)
    model, objective = build().eval(), ClassificationObjective()
    features = [{"input_ids": tokens(n, n), "labels": n % 3} for n in (4, 9, 1, 6)]
    with torch.no_grad():
        batch = Collator(PAD)(features)
        losses, predictions, references = objective.predict(model, batch)
        assert torch.equal(losses, objective.losses(model, batch))
        for row, example in enumerate(features):
            logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0]
            log_probs = log_softmax(logits.double().numpy())
            expected = -log_probs[example["labels"]]
            np.testing.assert_allclose(losses[row], expected, rtol=1e-5, atol=1e-5)
            assert predictions[row] == log_probs.argmax()
            assert references[row] == example["labels"]
    assert losses.dtype == torch.float32


def back_propagated(model: nn.Module, features: list[dict[str, Any]]) -> tuple[float, dict]:
    """Mean of transformers' losses (or of the options' cross entropy), and its gradient."""
    total = torch.zeros(())
    for example in features:
        if "labels" in example:
            ids, labels = (torch.tensor([example[name]]) for name in ("input_ids", "labels"))
            total = total + model(input_ids=ids, labels=labels).loss
            continue
        scores = []
        for option in example["option_ids"]:
            ids = torch.tensor([example["prompt_ids"] + option])
            labels = torch.tensor([[-100] * len(example["prompt_ids"]) + option])
            scores.append(-model(input_ids=ids, labels=labels).loss)
        total = total + torch.stack(scores).logsumexp(0) - scores[example["label"]]
    mean = total / len(features)
    parameters = tuned_parameters(model)
    gradients = torch.autograd.grad(mean, list(parameters.values()))
    return mean.item(), {name: g.clone() for name, g in zip(parameters, gradients)}


@pytest.mark.parametrize("features", [COMPLETIONS, RAGGED], ids=["completion", "options"])
@pytest.mark.parametrize("family", FAMILIES)
def test_mezos_slope_is_the_back_propagated_gradient_along_z(
    family: str, features: list[dict[str, Any]]
) -> None:
    model = make(family, "lora")
    loss, gradient = back_propagated(model, features)
    objective = CompletionObjective() if "labels" in features[0] else OptionObjective()
    space = FlatSpace(tuned_parameters(model))
    evaluator = evaluator_of(model, space, objective)
    batches = [Collator(PAD)(features[:1]), Collator(PAD)(features[1:])]
    assert evaluator([Direction()], batches) == [pytest.approx(loss, rel=1e-5)]
    length = sum(g.square().sum().item() for g in gradient.values()) ** 0.5
    for seed in range(3):
        projected = sum(
            g.flatten() @ noise_block(seed, name, 0, g.numel()) for name, g in gradient.items()
        )
        found = run_step(mezo(seed, 1e-4), lambda points: evaluator(points, batches))
        # |g| is the standard deviation of g . z; what is left is float32 rounding over 2 eps.
        assert abs(found.slope - projected) < 5e-3 * length
    assert all(parameter.grad is None for parameter in model.parameters())
