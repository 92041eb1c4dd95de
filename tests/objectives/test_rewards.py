"""Rewards of generated completions: what functions are given, how sampling is shared, learning."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import chisquare
from tiny import MODEL, command_line, examples, make_trainer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, EvalPrediction, PreTrainedModel

from scripts import reward_tuning
from zo_peft import Direction, UserError
from zo_peft.cli import main
from zo_peft.core.batch import Batch
from zo_peft.core.flat_space import FlatSpace
from zo_peft.data import Collator, read_rows
from zo_peft.data.collate import drawn_batch
from zo_peft.data.tokenize import Tokenization
from zo_peft.models.adapters import tuned_parameters
from zo_peft.models.recipe import evaluator_of
from zo_peft.objectives.rewards import CommonNoise, RewardObjective, load_function
from zo_peft.objectives.scoring import AccuracyObjective, CompletionObjective, SequenceObjective
from zo_peft.tools.demo import EMBEDDED, LABEL_WORDS

TOKENIZER = AutoTokenizer.from_pretrained(MODEL)
LORA = LoraConfig(
    task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False
)
PROMPTS = [
    "We ate",
    "The first chapter was moving. The",
    "On Monday",
    "It was",
    "The plot was poor.",
]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODEL).eval()


def prompts_batch(rows: Sequence[dict[str, Any]]) -> Batch:
    tokenization = Tokenization(TOKENIZER, generates=True, max_completion_length=8)
    features = [tokenization(row, index) for index, row in enumerate(rows)]
    return Collator(TOKENIZER.pad_token_id)(features)


def plain(prompts: Sequence[str] = PROMPTS) -> Batch:
    return prompts_batch([{"prompt": prompt} for prompt in prompts])


def length(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def code(completions: Sequence[str], **_: Any) -> list[float]:
    """A number that tells completions apart."""
    return [float(sum(i * ord(c) for i, c in enumerate(text, 1)) % 9973) for text in completions]


def objective(*functions: Any, **settings: Any) -> RewardObjective:
    return RewardObjective(
        functions or [code], TOKENIZER, **{"max_completion_length": 8, **settings}
    )


def greedy(model: nn.Module, prompt: str, count: int) -> list[int]:
    """Token by token, without a cache or padding."""
    ids = TOKENIZER(prompt)["input_ids"]
    start = len(ids)
    while len(ids) < start + count:
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == TOKENIZER.eos_token_id:
            break
        ids.append(token)
    return ids[start:]


# ---- What a reward function is given, and gives -------------------------------------------------


def test_a_function_is_given_prompts_completions_columns_and_ids(model: PreTrainedModel) -> None:
    seen: dict[str, Any] = {}

    def reward(**given: Any) -> list[float]:
        seen.update(given)
        return [0.0] * len(given["prompts"])

    rows = [{"prompt": p, "number": n, "answers": [str(n)]} for n, p in enumerate(PROMPTS)]
    objective(reward).predict(model, prompts_batch(rows))
    ids = [greedy(model, prompt, 8) for prompt in PROMPTS]
    assert seen == {
        "prompts": PROMPTS,
        "completions": [TOKENIZER.decode(row) for row in ids],
        "number": [0, 1, 2, 3, 4],
        "answers": [["0"], ["1"], ["2"], ["3"], ["4"]],
        "completion_ids": ids,
    }


def test_conversations_get_messages_as_completions(model: PreTrainedModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}.{% endfor %}"
        "{% if add_generation_prompt %} The{% endif %}"
    )
    seen: dict[str, Any] = {}

    def reward(**given: Any) -> list[float]:
        seen.update(given)
        return [0.0]

    prompt = [{"role": "user", "content": "We ate at the cafe"}]
    tokenization = Tokenization(tokenizer, generates=True, max_completion_length=8)
    batch = Collator(tokenizer.pad_token_id)([tokenization({"prompt": prompt}, 0)])
    RewardObjective([reward], tokenizer, max_completion_length=8).predict(model, batch)
    text = TOKENIZER.decode(greedy(model, "We ate at the cafe. The", 8))
    assert seen["prompts"] == [prompt]
    assert seen["completions"] == [[{"role": "assistant", "content": text}]]


def test_losses_are_minus_the_weighted_sum(model: PreTrainedModel) -> None:
    def vowels(completions: Sequence[str], **_: Any) -> list[float]:
        return [float(sum(c in "aeiou" for c in text)) for text in completions]

    rewards = objective(length, vowels, reward_weights=[2.0, -0.5], temperature=0.0)
    ids = [greedy(model, prompt, 8) for prompt in PROMPTS]
    counts = [[len(row), sum(c in "aeiou" for c in TOKENIZER.decode(row))] for row in ids]
    expected = [-2.0 * n + 0.5 * v for n, v in counts]
    assert rewards.losses(model, plain()).tolist() == expected
    losses, values, _ = rewards.predict(model, plain())
    assert losses.tolist() == expected
    assert values.tolist() == counts
    found = rewards.metrics(EvalPrediction(values.numpy(), np.zeros(5)))
    assert found == pytest.approx(
        {
            "reward": -np.mean(expected),
            "length": np.mean([n for n, _ in counts]),
            "vowels": np.mean([v for _, v in counts]),
        }
    )


def test_weights_must_be_one_for_each_function() -> None:
    with pytest.raises(
        UserError, match=r"reward_weights has 1 values; give one for each of 2 functions"
    ):
        objective(length, code, reward_weights=[1.0])


def raising(**_: Any) -> list[float]:
    raise KeyError("price")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raising, r"reward function raising failed: KeyError: 'price'; .* prompts, completions"),
        (lambda **_: [1.0], r"reward function <lambda> returned 1 values for 5 completions"),
        (lambda **_: ["good"] * 5, r"reward function <lambda> failed: ValueError"),
        (lambda **_: [None] * 5, r"reward function <lambda> failed: TypeError"),
        (lambda **_: 1.0, r"reward function <lambda> failed: TypeError"),
    ],
)
def test_a_faulty_function_is_named(function: Any, message: str, model: PreTrainedModel) -> None:
    with pytest.raises(UserError, match=message):
        objective(length, function).losses(model, plain())


def test_functions_load_by_name_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_rewards.py").write_text("def one(prompts, **_): return [1.0 for _ in prompts]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_function("own_rewards:one")(prompts=["a", "b"]) == [1.0, 1.0]


@pytest.mark.parametrize("name", ["no_such_module:f", "json:no_such", "json", ":f"])
def test_what_cannot_be_loaded_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"reward function {name!r} cannot be loaded"):
        load_function(name)


# ---- Generation: many candidates in one batch, with common random numbers -----------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_candidates_in_one_batch_generate_what_they_do_alone(temperature: float) -> None:
    torch.manual_seed(3)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), LORA).eval()
    space = FlatSpace(tuned_parameters(tuned))
    points = [Direction(), *(0.2 * Direction.of(seed) for seed in range(3))]
    found = {
        count: evaluator_of(tuned, space, objective(temperature=temperature), count).evaluate(
            [points] * 5, [plain()]
        )
        for count in (1, 2, 4)
    }
    assert found[1].losses == found[2].losses == found[4].losses
    assert len({tuple(column) for column in zip(*found[1].losses)}) == 4
    if not temperature:
        for number, point in enumerate(points):
            with space.displaced(point):
                texts = [TOKENIZER.decode(greedy(tuned, prompt, 8)) for prompt in PROMPTS]
            expected = [-value for value in code(texts)]
            assert [losses[number] for losses in found[4].losses] == expected


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7)])
def test_each_candidate_samples_from_its_own_softmax(temperature: float, top_p: float) -> None:
    logits = torch.tensor([[1.0, 0.0, -0.5, 2.0, 0.5, -3.0], [0.0, 2.5, 0.0, -1.0, 1.0, 0.2]])
    draws = 4000
    counts = np.zeros((2, 6))
    for seed in range(draws):
        noise = CommonNoise(seed, copies=2, temperature=temperature, top_p=top_p)
        tokens = noise(torch.zeros(2, 1, dtype=torch.long), logits).argmax(dim=1)
        counts[[0, 1], tokens.numpy()] += 1
    exponentials = np.exp(logits.double().numpy() / temperature)
    for row, own in zip(counts, exponentials / exponentials.sum(axis=1, keepdims=True)):
        order = np.argsort(-own)
        kept = order[np.cumsum(own[order]) - own[order] < top_p]  # the least set of mass top_p
        assert row.sum() == row[kept].sum() == draws
        expected = draws * own[kept] / own[kept].sum()
        assert chisquare(row[kept], expected).pvalue > 1e-3


def test_copies_of_an_example_share_noise_and_examples_and_positions_do_not() -> None:
    scores, ids = torch.zeros(6, 50), torch.zeros(6, 1, dtype=torch.long)
    noise = CommonNoise(5, copies=3, temperature=1.0, top_p=1.0)
    first, second = (noise(ids, scores).view(3, 2, 50) for _ in range(2))
    assert torch.equal(first[0], first[1])
    assert torch.equal(first[0], first[2])
    for one, other in ((first[0, 0], first[0, 1]), (first[0], second[0])):
        assert abs(np.corrcoef(one.flatten(), other.flatten())[0, 1]) < 0.5
    again = CommonNoise(5, copies=1, temperature=1.0, top_p=1.0)
    assert torch.equal(again(ids[:2], scores[:2]), first[0])


def test_the_noise_follows_the_seed(model: PreTrainedModel) -> None:
    rewards = objective()
    found = []
    for seed in (1, 2, 1):
        rewards.seed = seed
        found.append(rewards.losses(model, plain().repeated(2)).view(2, -1))
    assert torch.equal(found[0][0], found[0][1])  # candidates that are the same
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_a_run_draws_anew_in_every_step(tmp_path: Path) -> None:
    seeds = []

    def record(prompts: Sequence[str], **_: Any) -> list[float]:
        seeds.append(trainer.objective.seed)
        return [0.0] * len(prompts)

    trainer = reward_tuning.make(
        "LoRA", tmp_path, record, zo_eps=0.01, max_steps=3, candidates_per_forward=2
    )
    trainer.train()
    assert len(seeds) == 6  # two waves a step
    assert seeds[::2] == seeds[1::2]
    assert len(set(seeds)) == 3


# ---- Eps, from the likelihood of what was drawn -------------------------------------------------


def test_drawn_completions_are_a_batch_of_their_whole_likelihood(model: PreTrainedModel) -> None:
    rewards = objective(temperature=0.0, max_completion_length=100)
    batch = drawn_batch(plain(), rewards.drawn(model, plain()), TOKENIZER.pad_token_id)
    with torch.no_grad():
        losses = SequenceObjective().losses(model, batch)
    ended = 0
    for prompt, loss in zip(PROMPTS, losses):
        start, ids = TOKENIZER(prompt)["input_ids"], greedy(model, prompt, 100)
        ended += len(ids) < 100
        ids = ids + [TOKENIZER.eos_token_id] * (len(ids) < 100)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([start + ids])).logits[0, len(start) - 1 : -1]
        nll = -torch.log_softmax(logits, dim=1)[torch.arange(len(ids)), ids].sum()
        assert loss.item() == pytest.approx(nll.item(), rel=1e-4)
    assert 0 < ended < 5


def test_eps_is_near_a_line_where_all_rewards_are_alike(tmp_path: Path) -> None:
    trainer = reward_tuning.make(
        "LoRA", tmp_path, lambda prompts, **_: [0.0] * len(prompts), max_steps=1
    )
    trainer.train()
    (chosen,) = trainer.calibrations
    assert 3e-3 < chosen.zo_eps < 0.05  # at 0.1 all completions are others; see also docs
    assert chosen.error <= 0.3
    # 9 rungs, 2 signs and the start; then a step of 4.
    assert trainer.forward_passes == 19 + 4


def test_common_random_numbers_cut_the_variance_to_a_fifth(tmp_path: Path) -> None:
    eps = reward_tuning.make("LoRA", tmp_path, max_steps=1)
    eps.train()
    trainer = reward_tuning.make("LoRA", tmp_path, max_steps=1, zo_eps=1.0)
    chosen = eps.calibrations[0].zo_eps
    assert reward_tuning.variance_ratio(trainer, chosen, pairs=4, examples=64) >= 5


# ---- Accuracy -----------------------------------------------------------------------------------


class Fixed(nn.Module):
    """An objective's `predict` with given values."""

    def __init__(self, predictions: Tensor, references: Tensor) -> None:
        super().__init__()
        self.given = torch.zeros(len(references)), predictions, references

    def predict(self, *_: Any) -> Any:
        return self.given


def test_accuracy_counts_wrong_labels() -> None:
    fixed: Any = Fixed(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 0, 1]))
    assert AccuracyObjective(fixed).losses(fixed, Batch()).tolist() == [0, 0, 1, 1]


def test_accuracy_of_completions_is_a_share_of_their_tokens() -> None:
    references = torch.tensor([[-100, 5, 6, 7, 8], [-100, -100, -100, 9, -100]])
    predictions = torch.tensor([[5, 5, 0, 7, 0], [-100, 3, 3, 9, 3]])
    fixed: Any = Fixed(predictions, references)
    assert AccuracyObjective(fixed).losses(fixed, Batch()).tolist() == [0.5, 0.0]


def test_accuracy_agrees_with_the_model_token_by_token(model: PreTrainedModel) -> None:
    prompt, completion = "We ate at the", " cafe. The cake was nice."
    tokenization = Tokenization(TOKENIZER)
    batch = Collator(TOKENIZER.pad_token_id)(
        [tokenization({"prompt": prompt, "completion": completion}, 0)]
    )
    ids = TOKENIZER(prompt + completion)["input_ids"] + [TOKENIZER.eos_token_id]
    start = len(TOKENIZER(prompt)["input_ids"])
    with torch.no_grad():
        found = model(input_ids=torch.tensor([ids])).logits[0].argmax(dim=1).tolist()
        loss = AccuracyObjective(CompletionObjective()).losses(model, batch)
    wrong = [found[i - 1] != ids[i] for i in range(start, len(ids))]
    assert 0 < sum(wrong) < len(wrong)
    assert loss.tolist() == pytest.approx([np.mean(wrong)])


# ---- Learning -----------------------------------------------------------------------------------


def test_accuracy_alone_is_learned(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
        train=examples(count=1000),
        test=examples("test", 400),
        objective="accuracy",
        max_steps=-1,
        max_forward_passes=1000,
        zo_eps=None,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=100,
    )
    assert trainer.evaluate()["eval_accuracy"] == 0.5
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] >= 0.85


@pytest.mark.skipif(not hasattr(peft, "TinyLoraConfig"), reason="this version of PEFT lacks it")
def test_thirteen_numbers_learn_a_reward_without_a_gradient(tmp_path: Path) -> None:
    trainer = reward_tuning.make(
        "TinyLoRA",
        tmp_path,
        max_forward_passes=1200,
        learning_rate=3e-3,
        per_device_train_batch_size=32,
        candidates_per_forward=4,
        seed=0,
    )
    assert trainer.tuned_numel == 13
    assert trainer.evaluate()["eval_praises"] <= 0.3
    trainer.train()
    assert trainer.evaluate()["eval_praises"] >= 0.9


def test_steps_without_a_slope_make_no_other_slope_an_outlier(tmp_path: Path) -> None:
    """For 40 steps all rewards are alike, as with a reward that is seldom given."""
    calls = 0

    def late(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        nonlocal calls
        calls += 1
        return [float(sum(ids) % 7) * (calls > 40) for ids in completion_ids]

    trainer = reward_tuning.make(
        "LoRA",
        tmp_path,
        late,
        zo_eps=0.05,
        learning_rate=1e-3,
        max_steps=44,
        per_device_train_batch_size=4,
        candidates_per_forward=4,
    )
    trainer.train()
    assert calls == 44
    assert trainer.faults.skipped == 0


# ---- The command line ---------------------------------------------------------------------------


def command(tmp_path: Path, **options: Any) -> list[str]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join((EMBEDDED / "train.jsonl").read_text().splitlines(True)[:12]))
    short = {"max_steps": 2, "max_completion_length": 4, "lora_target_modules": "q_proj"}
    given = {"train_file": rows, "eval_file": rows, "label_words": None, **short, **options}
    return ["train", "--json", *command_line(tmp_path / "out", **given)]


@pytest.mark.parametrize("name", ["accuracy", "f1", "exact_match"])
def test_the_command_line_trains_for_a_metric(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tmp_path, objective=name, label_words=LABEL_WORDS)) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["metric_name"] == name
    assert 0 <= result["metric_after"] <= 1
    assert result["settings"]["objective"] == name


def test_the_command_line_trains_for_a_reward(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cli_rewards.py").write_text(
        "def odd(prompts, completions, label, **_): return [2.5 + l for l in label]"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(command(tmp_path, reward_funcs="cli_rewards:odd")) == 0
    result = json.loads(capsys.readouterr().out)
    labels = [row["label"] for row in read_rows(EMBEDDED / "train.jsonl")[:12]]
    assert result["metric_name"] == "odd"
    assert result["metric_after"] == pytest.approx(2.5 + np.mean(labels))
    assert result["settings"]["reward_funcs"] == ["cli_rewards:odd"]


def test_the_command_line_names_a_reward_that_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tmp_path, reward_funcs="no_such_module:odd")) == 2
    assert "'no_such_module:odd' cannot be loaded" in capsys.readouterr().err
