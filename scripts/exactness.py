"""What `families.py` and `adapters.py` share: losses of a shared forward against plain PEFT.

Plain is one candidate, one example and one option at a time, without padding or masks, and with the
losses written out once more. This module is imported and not run itself.
"""

import argparse
import os
import warnings
from contextlib import redirect_stderr
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers.utils import logging

from zo_peft.core.batch import Objective
from zo_peft.core.direction import Direction
from zo_peft.core.flat_space import FlatSpace
from zo_peft.data import Collator, collator_for
from zo_peft.errors import UserError
from zo_peft.models.adapters import tuned_parameters
from zo_peft.models.agreement import check, rounding
from zo_peft.models.recipe import evaluator_of
from zo_peft.objectives.scoring import (
    ClassificationObjective,
    CompletionObjective,
    OptionObjective,
)

#: Token ids of the examples are below this one.
VOCABULARY = 64
#: How far tuned numbers are displaced.
LENGTH = 0.1


def tokens(start: int, length: int) -> list[int]:
    """So many token ids, the same for the same start, none of them special."""
    generator = torch.Generator().manual_seed(start)
    return torch.randint(10, VOCABULARY, (length,), generator=generator).tolist()


LENGTHS = (9, 24, 30, 17)
WORDS = [
    {"prompt_ids": tokens(n, n), "option_ids": [[11], [13], [17]], "label": n % 3} for n in LENGTHS
]
OPTIONS = [
    {"prompt_ids": tokens(n, n), "option_ids": [tokens(2, 9), [13], tokens(n, 5)], "label": n % 3}
    for n in LENGTHS
]
COMPLETIONS = [
    {"input_ids": tokens(n, n), "labels": [-100] * (n - 5) + tokens(n, n)[-5:]} for n in LENGTHS
]
# Some classifiers read the state at the end of the sequence.
CLASSES = [{"input_ids": [*tokens(n, n), 2], "labels": n % 3} for n in LENGTHS]
DATA: dict[str, tuple[Objective, list[dict[str, Any]]]] = {
    "words": (OptionObjective(), WORDS),
    "options": (OptionObjective(), OPTIONS),
    "completions": (CompletionObjective(), COMPLETIONS),
    "classes": (ClassificationObjective(), CLASSES),
}


def quiet() -> None:
    """No word of the libraries between the figures."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@torch.no_grad()
def plain_loss(model: PeftModel, example: dict[str, Any]) -> Tensor:
    """The loss of one example, from logits of single unpadded sequences."""

    def log_likelihood(prompt: list[int], ending: list[int]) -> Tensor:
        ids = torch.tensor([prompt + ending])
        logits = model(input_ids=ids, use_cache=False).logits[0].double()
        predicted = logits[-len(ending) - 1 : -1].log_softmax(-1)
        return predicted.gather(1, torch.tensor(ending)[:, None]).mean()

    if "option_ids" in example:
        options = example["option_ids"]
        scores = [log_likelihood(example["prompt_ids"], option) for option in options]
        return -torch.stack(scores).log_softmax(0)[example["label"]]
    if isinstance(example["labels"], int):
        logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0].double()
        return -logits.log_softmax(0)[example["labels"]]
    scored = sum(label != -100 for label in example["labels"])
    return -log_likelihood(example["input_ids"][:-scored], example["input_ids"][-scored:])


def verdict(model: PeftModel, what: str) -> str:
    """Whether the losses of a step are the plain ones: exact, one by one, refused, or WRONG."""
    objective, examples = DATA[what]
    try:
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            return _verdict(model.eval(), objective, examples)
    except UserError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"TRACEBACK: {type(error).__name__}: {error}".splitlines()[0]


def _verdict(model: PeftModel, objective: Objective, examples: list[dict[str, Any]]) -> str:
    collator = collator_for(model, 0, objective, examples=examples)
    space = FlatSpace(tuned_parameters(model))
    plainest = Collator(0, is_causal=collator.is_causal)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        evaluator = evaluator_of(model, space, objective)
        two = [examples[0], examples[2]]
        check(evaluator, collator(two), [plainest([one]) for one in two])
        batch = collator(examples)
        wrong = 0.0
        for parts in {1, evaluator.parts([batch])}:
            seeds = [[c + 2 * part for part in range(parts)] for c in range(2)]
            points = [[LENGTH * Direction.of(seed) for seed in row] for row in seeds]
            with torch.no_grad():
                losses = evaluator.batch_losses(points, batch).double()
            expected = torch.zeros_like(losses)
            for c, row in enumerate(points):
                for e, example in enumerate(examples):
                    with space.displaced(row[e % parts]):
                        expected[c, e] = plain_loss(model, example)
            off = (losses - expected).abs().max().item()
            noise = rounding(model)
            moved = (expected - expected.mean(dim=0)).abs().max().item()
            wrong = max(wrong, off / (moved * (0.01 + 32 * noise) + 32 * noise))
    if wrong > 1:
        return f"WRONG: by {wrong:.1f} times the tolerance"
    reasons = [str(w.message) for w in caught if "one by one" in str(w.message)]
    if reasons:
        return reasons[0].partition("candidates are evaluated ")[2]
    shared = " (one prompt)" if "segments" in batch else ""
    return f"exact{shared}"


def parser(description: str) -> argparse.ArgumentParser:
    """A command line that takes names of rows to try."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--only", nargs="*", help="the rows to try; default: all")
    return made
