"""What a trainer, or a command, would pass over without a word: refused, or told."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import LORA, MODEL, command_line, examples, make_trainer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    TrainerCallback,
)

from zo_peft import GradientTrainer, UserError, ZOConfig, ZOTrainer
from zo_peft.cli import main
from zo_peft.objectives.scoring import ClassificationObjective


class OwnLoss(ZOTrainer):
    def compute_loss(self, *_: Any, **__: Any) -> Any:
        return torch.zeros(())


class OwnOptimizer(ZOTrainer):
    def create_optimizer(self, model: Any = None) -> Any:
        return torch.optim.AdamW(self.model.parameters())


class OwnEvaluation(ZOTrainer):
    def prediction_step(self, *_: Any, **__: Any) -> Any:
        return torch.tensor(3.0), None, None


@pytest.mark.parametrize(
    ("kind", "name"), [(OwnLoss, "compute_loss"), (OwnOptimizer, "create_optimizer")]
)
def test_what_would_not_be_asked_is_not_overridden(
    kind: type[ZOTrainer], name: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"{name} would not be asked; give an objective"):
        make_trainer(tmp_path, kind=kind)


def test_what_is_asked_may_be_overridden(tmp_path: Path) -> None:
    assert make_trainer(tmp_path, kind=OwnEvaluation).evaluate()["eval_loss"] == 3.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("zo_eps", 0.1),
        ("num_candidates", 16),
        ("max_forward_passes", 400),
        ("noise", "gaussian"),
        ("max_length", 8),
        ("seed", 7),
        ("per_device_train_batch_size", 4),
    ],
)
def test_arguments_that_are_not_read_again_stay(name: str, value: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    setattr(trainer.args, name, value)
    with pytest.raises(UserError, match=f"{name} was changed after the trainer was built"):
        trainer.train()


def test_arguments_that_are_read_again_may_change(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, logging_steps=1, warmup_steps=0)
    trainer.args.max_steps, trainer.args.learning_rate = 2, 0.25
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.state.log_history[0]["learning_rate"] == 0.25
    # And a second time, with nothing changed.
    assert trainer.train().global_step == 2


def test_arguments_of_which_the_trainer_made_a_copy_stay(tmp_path: Path) -> None:
    args = ZOConfig(str(tmp_path), use_cpu=True, zo_eps=1e-2)
    trainer = ZOTrainer(MODEL, args, train_dataset=examples(), peft_config=LORA)
    assert trainer.args is not args
    args.learning_rate = 0.25
    with pytest.raises(UserError, match="learning_rate was changed"):
        trainer.train()


class Edits(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, parameter in kwargs["model"].named_parameters():
            if "lora_B" in name:
                parameter.data.mul_(0.5)


def test_what_a_callback_makes_of_the_adapter_is_not_lost_in_silence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lora_B.* was changed after the trainer was built"):
        make_trainer(tmp_path, callbacks=[Edits()]).train()


def metrics(decide: Callable[[Any], Any]) -> Any:
    """A function as those of transformers' examples, which has to `decide` first."""
    return lambda p: {"right": float(np.mean(decide(p.predictions) == p.label_ids))}


def test_predictions_that_are_decided_are_not_decided_again(tmp_path: Path) -> None:
    rows, tokenizer = examples("test"), AutoTokenizer.from_pretrained(MODEL)
    args = ZOConfig(str(tmp_path), use_cpu=True)
    given: dict[str, Any] = {"processing_class": tokenizer, "eval_dataset": rows}

    def made(own: Any) -> ZOTrainer:
        settings = {"train_dataset": rows, "peft_config": LORA, "compute_metrics": own}
        return ZOTrainer(MODEL, args, **given, **settings)

    figures = made(metrics(lambda predictions: predictions)).evaluate()
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    words = [
        tokenizer(word, add_special_tokens=False)["input_ids"] for word in (" terrible", " great")
    ]
    right = []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
            logits = model(input_ids=ids).logits[0, -1]
            right.append(logits[[word[0] for word in words]].argmax().item() == row["label"])
    assert figures["eval_right"] == np.mean(right)
    with pytest.raises(UserError, match="are indices already; leave argmax out"):
        made(metrics(lambda predictions: np.argmax(predictions, axis=-1))).evaluate()

    def unpacked(given: Any) -> Any:
        logits, labels = given
        return {"right": (logits.argmax(-1) == labels).mean()}

    with pytest.raises(UserError, match="are indices already; leave argmax out"):
        made(unpacked).evaluate()


def test_what_is_computed_of_predictions_may_be_of_numpy(tmp_path: Path) -> None:
    def own(given: Any) -> dict[str, Any]:
        right = given.predictions == given.label_ids
        return {"share": right.mean(), "sum": np.sum(given.predictions), "first": right.argmax()}

    args, rows = ZOConfig(str(tmp_path), use_cpu=True), examples("test")
    trainer = ZOTrainer(MODEL, args, eval_dataset=rows, peft_config=LORA, compute_metrics=own)
    figures = trainer.evaluate()
    # All figures are written as JSON.
    trainer.save_state()
    read = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"][0]
    assert {name: read[f"eval_{name}"] for name in ("share", "sum", "first")} == {
        name: figures[f"eval_{name}"] for name in ("share", "sum", "first")
    }


class Scores(ClassificationObjective):
    """As that of classes, with the scores of all classes as predictions."""

    def predict(self, model: Any, batch: Any) -> Any:
        losses, _, right = super().predict(model, batch)
        return losses, self.scores(model, batch), right


def test_scores_of_an_objective_of_ones_own_are_not_decided(tmp_path: Path) -> None:
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])
    rows = [{"text": f"word {number}", "label": number % 2} for number in range(8)]
    args = ZOConfig(str(tmp_path), use_cpu=True)
    own = metrics(lambda predictions: predictions.argmax(axis=-1))
    given: dict[str, Any] = {"peft_config": config, "train_dataset": rows, "eval_dataset": rows}
    scored = ZOTrainer(MODEL, args, eval_objective=Scores(), compute_metrics=own, **given)
    figures = scored.evaluate()
    assert figures["eval_right"] == ZOTrainer(MODEL, args, **given).evaluate()["eval_accuracy"]


def test_a_collator_that_makes_other_batches_is_refused(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rows = [{"prompt": "a b", "completion": "c"}] * 8
    args = ZOConfig(str(tmp_path), use_cpu=True)
    for collator in (DataCollatorForSeq2Seq(tokenizer), DataCollatorWithPadding(tokenizer)):
        with pytest.raises(UserError, match="batches of data_collator lack positions, rows, token"):
            ZOTrainer(*(MODEL, args, collator, rows), processing_class=tokenizer, peft_config=LORA)


def test_a_collator_that_pads_texts_of_classes_gives_their_losses(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rows = [{"text": "word " * (1 + number), "label": number % 2} for number in range(8)]
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])
    args = ZOConfig(str(tmp_path), use_cpu=True)
    losses = [
        ZOTrainer(
            *(MODEL, args, collator, rows, rows), processing_class=tokenizer, peft_config=config
        ).evaluate()["eval_loss"]
        for collator in (None, DataCollatorWithPadding(tokenizer))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_base_that_is_not_that_of_its_files_is_told(tmp_path: Path) -> None:
    first = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    base = AutoModelForCausalLM.from_pretrained(MODEL)
    merged = get_peft_model(base, first).merge_and_unload()
    with pytest.warns(UserWarning, match=r"q_proj\.weight is not as in model: the adapter fits"):
        make_trainer(tmp_path / "a", model=merged, max_steps=1).train()
    # A journal of it is of another base, so the run does not go on from the files.
    with pytest.raises(UserError, match="another base"):
        make_trainer(tmp_path / "a", max_steps=1).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("start", [True, "gaussian", "pissa", "olora"])
def test_a_base_as_it_was_loaded_is_that_of_its_files(start: Any, tmp_path: Path) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=start)
    for dtype in ("float32", "bfloat16"):
        base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".* is not as in")
            make_trainer(tmp_path / dtype, config, model=base, max_steps=1).train()


def test_a_run_does_not_go_on_with_other_data(tmp_path: Path) -> None:
    make_trainer(tmp_path).train()
    with pytest.raises(UserError, match=r"zo_journal is of .* or other data"):
        make_trainer(tmp_path, train=examples()[::-1]).train(resume_from_checkpoint=True)
    assert make_trainer(tmp_path).train(resume_from_checkpoint=True).global_step == 4


def test_the_seed_of_the_data_may_be_zero(tmp_path: Path) -> None:
    def order(**settings: Any) -> list[int]:
        trainer = make_trainer(tmp_path, **settings)
        return [label for batch in trainer.get_train_dataloader() for label in batch["labels"]]

    assert order(seed=42, data_seed=0) == order(seed=0) != order(seed=42)


@pytest.mark.parametrize("kind", [ZOTrainer, GradientTrainer])
def test_a_trainer_may_be_given_rows_in_an_array(kind: Any, tmp_path: Path) -> None:
    settings = {"strategy": "adam"} if kind is GradientTrainer else {"strategy": "gv"}
    args = ZOConfig(str(tmp_path), use_cpu=True, **settings)
    rows = np.array(examples())
    assert len(kind(MODEL, args, train_dataset=rows, peft_config=LORA).train_dataset) == len(rows)


@pytest.mark.parametrize(
    ("changes", "unused"),
    [
        ({"peft_type": "IA3", "lora_r": 4}, "--lora_r"),
        ({"peft_type": "PREFIX_TUNING"}, "--lora_target_modules"),
        ({"num_virtual_tokens": 7}, "--num_virtual_tokens"),
        ({"tune": "weights", "lora_alpha": 3}, "--lora_alpha, --lora_target_modules"),
    ],
)
def test_options_that_have_no_say_are_named(
    changes: dict[str, Any], unused: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = {"max_steps": 1, "strategy": "gv", "save_strategy": "no", "eval_file": None}
    assert main(["train", *command_line(tmp_path, **run, **changes)]) == 0
    assert f"note: not used in this run, because of the other options: {unused}\n" in (
        capsys.readouterr().err
    )
