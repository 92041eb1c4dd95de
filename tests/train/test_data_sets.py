"""What a trainer does with data sets and tokenizers as users bring them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PromptTuningConfig
from tiny import LORA, MODEL, SIZES, WIDTH, bert, examples, llama, make_trainer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CanineConfig,
    CanineForSequenceClassification,
    CanineTokenizer,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from zo_peft import UserError, ZOConfig, ZOTrainer
from zo_peft.runs.arguments import DataArguments

OPTIONS = examples(count=12)
COMPLETIONS = [
    {"prompt": row["prompt"], "completion": row["options"][row["label"]]} for row in OPTIONS
]
HEAD = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])


def refused(action: Callable[[], object], *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        action()
    assert len(str(caught.value).splitlines()) == 1
    assert [part for part in parts if part not in str(caught.value)] == []


def trainer(folder: Path, tokenizer: Any = None, **settings: Any) -> ZOTrainer:
    """A trainer that is given a tokenizer, and whatever else differs."""
    defaults = {"model": MODEL, "train_dataset": OPTIONS, "peft_config": LORA}
    goal = settings.pop("objective", None)
    args = ZOConfig(str(folder), max_steps=1, use_cpu=True, report_to="none", objective=goal)
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(MODEL)
    return ZOTrainer(args=args, processing_class=tokenizer, **{**defaults, **settings})


def test_examples_can_be_evaluated_at_any_time(tmp_path: Path) -> None:
    run = make_trainer(tmp_path, train=OPTIONS, test=OPTIONS)
    expected = run.evaluate()["eval_loss"]
    for data in (OPTIONS, Dataset.from_list(OPTIONS), (row for row in OPTIONS), run.eval_dataset):
        assert run.evaluate(data)["eval_loss"] == expected
    found = run.predict(Dataset.from_list(OPTIONS).with_format("torch"))
    assert found.label_ids.tolist() == [row["label"] for row in OPTIONS]
    refused(lambda: run.evaluate(COMPLETIONS), "examples of completions", "evaluates options")


def test_a_model_without_a_name_has_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    run = ZOTrainer(
        llama(vocab_size=1024),
        train_dataset=COMPLETIONS,
        processing_class=tokenizer,
        peft_config=LORA,
    )
    assert run.args.output_dir == "base-zo"


def test_several_data_sets_are_evaluated_if_they_are_of_one_kind(tmp_path: Path) -> None:
    parts = DatasetDict(a=Dataset.from_list(OPTIONS), b=Dataset.from_list(OPTIONS[:4]))
    run = make_trainer(tmp_path, train=COMPLETIONS, test=parts)  # type: ignore[arg-type]
    assert {"eval_a_accuracy", "eval_b_accuracy"} <= run.evaluate().keys()
    mixed: Any = {"a": OPTIONS, "b": COMPLETIONS}
    refused(lambda: make_trainer(tmp_path, test=mixed), "a of options, b of completions")
    refused(lambda: make_trainer(tmp_path, train=parts), "several", "a, b")  # type: ignore[arg-type]


def test_accuracy_of_tokens_is_called_so(tmp_path: Path) -> None:
    run = make_trainer(tmp_path, train=COMPLETIONS, test=COMPLETIONS)
    assert run.metric_name == "token_accuracy"
    found = run.evaluate()
    assert "eval_token_accuracy" in found
    assert "eval_accuracy" not in found


TEXTS = [{"text": row["prompt"], "label": index % 3} for index, row in enumerate(OPTIONS)]


@pytest.mark.parametrize(
    "data",
    [
        TEXTS,
        Dataset.from_list(TEXTS).with_format("torch"),
        (row for row in TEXTS),
        Dataset.from_list(TEXTS).to_iterable_dataset(),
        [{"input_ids": [5, 6], "labels": n % 3, "label": 0} for n in range(6)],
    ],
    ids=["list", "torch", "iterator", "stream", "tokens"],
)
def test_a_new_head_has_the_classes_of_the_labels(data: Any, tmp_path: Path) -> None:
    assert trainer(tmp_path, train_dataset=data, peft_config=HEAD).model.config.num_labels == 3


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ([{**row, "label": 10**9} for row in TEXTS], "label 1000000000 is no class index"),
        ([{"text": "a"}], "it has the columns text; this model needs text + label"),
        ([row["text"] for row in TEXTS], "each of them a dictionary"),
        (DatasetDict(train=Dataset.from_list(TEXTS)), "several data sets (train); give one of"),
        (3, "give one Dataset"),
    ],
    ids=["number", "unlabelled", "texts", "several", "none"],
)
def test_what_makes_no_classes_is_refused(data: Any, part: str, tmp_path: Path) -> None:
    refused(lambda: trainer(tmp_path, train_dataset=data, peft_config=HEAD), part)


def test_what_a_trainer_cannot_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is nothing to train on"):
        trainer(tmp_path, train_dataset=None).train()
    weights = ZOConfig(str(tmp_path), reward_weights=[1], max_steps=1, use_cpu=True)
    refused(lambda: ZOTrainer(MODEL, weights, train_dataset=OPTIONS, peft_config=LORA), "reward")
    for config in (LoraConfig, {"peft_type": "LORA"}, None):
        refused(
            lambda own=config: trainer(tmp_path, peft_config=own),
            "a peft_config (such as a LoraConfig)",
        )
    for tokens, part in ((0, "give 1 or more"), (256, "below 256")):
        prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens)
        refused(lambda own=prompt: trainer(tmp_path, peft_config=own), "num_virtual_tokens", part)
    config = ZOConfig(str(tmp_path), lr_scheduler_kwargs={"a": 1}, max_steps=1, use_cpu=True)
    run = ZOTrainer(MODEL, config, train_dataset=OPTIONS, peft_config=LORA)
    refused(run.train, "lr_scheduler_kwargs do not fit")


def test_rewards_are_for_language_models(tmp_path: Path) -> None:
    given = {"model": llama(LlamaForSequenceClassification), "peft_config": HEAD}
    refused(lambda: trainer(tmp_path, objective="f1", **given), "head for classes")


@pytest.mark.parametrize("pad", [0, 5])
def test_the_head_looks_for_the_token_that_pads(pad: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert tokenizer.pad_token_id != 5
    rows = [{"text": "a fine film " * (1 + n % 3), "label": n % 2} for n in range(8)]
    model = llama(LlamaForSequenceClassification, vocab_size=len(tokenizer), pad_token_id=pad)
    run = trainer(tmp_path, model=model, train_dataset=rows, eval_dataset=rows, peft_config=HEAD)
    run.args.per_device_eval_batch_size = 1
    alone = run.evaluate()["eval_loss"]
    run.args.per_device_eval_batch_size = 8
    assert run.evaluate()["eval_loss"] == pytest.approx(alone, rel=1e-5)


def test_the_end_of_sequence_pads_where_nothing_else_does(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.pad_token = None
    run = trainer(tmp_path, tokenizer)
    assert run.data_collator.pad_token_id == tokenizer.eos_token_id
    tokenizer.pad_token = tokenizer.eos_token = None
    refused(lambda: trainer(tmp_path, tokenizer), "no padding token", "set pad_token")


def test_token_ids_beyond_the_embedding_are_refused(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    rows = AutoModelForCausalLM.from_pretrained(MODEL).get_input_embeddings().weight.shape[0]
    refused(lambda: trainer(tmp_path, tokenizer), f"token id {rows} is beyond the {rows} rows")
    data = [{"input_ids": [5, rows], "labels": [5, 5]}]
    refused(lambda: trainer(tmp_path, train_dataset=data), "row 1: token id", "resize_token")


def test_a_base_without_token_embeddings_classifies(tmp_path: Path) -> None:
    sizes = {**SIZES, "intermediate_size": WIDTH, "num_hash_buckets": 64, "num_labels": 2}
    blocks = dict.fromkeys(("local_transformer_stride", "downsampling_rate"), 4)
    torch.manual_seed(0)
    base = CanineForSequenceClassification(CanineConfig(**sizes, **blocks)).eval()
    base.save_pretrained(tmp_path / "base")
    rows = [{"text": text, "label": n} for n, text in enumerate(("a fine film", "a dull one!"))]
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    given = {"model": str(tmp_path / "base"), "train_dataset": rows, "peft_config": config}
    run = trainer(tmp_path / "run", CanineTokenizer(), **given)
    inputs = CanineTokenizer()([row["text"] for row in rows], return_tensors="pt")
    with torch.no_grad():
        expected = base(**inputs, labels=torch.tensor([0, 1])).loss.item()
    assert run.evaluate(rows)["eval_loss"] == pytest.approx(expected, rel=1e-5)
    run.save_model()
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_positions_that_begin_behind_the_padding_are_not_counted(tmp_path: Path) -> None:
    sizes = {**SIZES, "pad_token_id": 1, "intermediate_size": WIDTH}

    def roberta() -> RobertaForSequenceClassification:
        return RobertaForSequenceClassification(RobertaConfig(**sizes, type_vocab_size=1))

    for made, room in ((roberta, 62), (bert, 64)):
        given = {"peft_config": LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])}
        data = [[{"input_ids": [5] * length, "labels": 1}] * 2 for length in (room, room + 1)]
        trainer(tmp_path, model=made(), train_dataset=data[0], **given).evaluate(data[0])
        long = {"model": made(), "train_dataset": data[1], **given}
        refused(partial(trainer, tmp_path, **long), f"holds {room}")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"task": "sst2", "train_file": "a.csv"}, "--train_file is not used with --task"),
        ({"task": "sst2", "label_words": "a,b"}, "--label_words is not used with --task"),
        ({"train_file": "a.csv", "num_train": 5}, "--num_train is only for a --task"),
        ({"train_file": "a", "dataset_test_split": "b"}, "--dataset_test_split is of a --dataset"),
        ({"train_file": "a.csv", "dataset_name": "b"}, "--train_file or --dataset_name"),
        ({"eval_file": "a", "dataset_test_split": "b"}, "--eval_file or --dataset_test_split"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options: dict[str, Any], part: str) -> None:
    refused(lambda: DataArguments(**options), part)


def test_a_label_word_may_hold_a_comma() -> None:
    assert DataArguments(label_words='"so, so", great').words() == ["so, so", "great"]
