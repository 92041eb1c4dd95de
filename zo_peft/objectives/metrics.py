"""F1 and exact match of generated answers, as SQuAD and DROP define them officially.

SQuAD: Rajpurkar et al., arXiv:1606.05250, evaluation script v1.1. DROP: Dua et al.,
arXiv:1903.00161, `drop_eval.py`. A generated answer counts as one span of text.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

_PUNCTUATION = str.maketrans("", "", string.punctuation)

#: A DROP answer: one span, or all of several.
Spans = str | Sequence[str]


def squad_words(text: str) -> list[str]:
    """The words that SQuAD compares: lower case, no punctuation, no articles."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


def squad_exact_match(prediction: str, answer: str) -> float:
    """1.0 if the two have the same words in the same order, else 0.0."""
    return float(squad_words(prediction) == squad_words(answer))


def squad_f1(prediction: str, answer: str) -> float:
    """The harmonic mean of precision and recall of words; a repeated word counts repeatedly."""
    predicted, right = squad_words(prediction), squad_words(answer)
    common = sum((Counter(predicted) & Counter(right)).values())
    return 2 * common / (len(predicted) + len(right)) if common else 0.0


def drop_words(text: str) -> list[str]:
    """The words that DROP compares: SQuAD's, but numbers keep their sign and their point.

    Words are separated by spaces and hyphens; a number is written like a float of Python.
    """
    words: list[str] = []
    for token in re.split("[ -]", text.lower()):
        token = token if _is_number(token) else token.translate(_PUNCTUATION)
        token = str(float(token)) if _is_number(token) else token
        words += re.sub(r"\b(a|an|the)\b", " ", token).split()
    return words


def drop_exact_match(prediction: str, answer: Spans) -> float:
    """1.0 if the answer is one span with the prediction's words in the same order, else 0.0."""
    spans = [answer] if isinstance(answer, str) else answer
    return float([drop_words(span) for span in spans] == [drop_words(prediction)])


def drop_f1(prediction: str, answer: Spans) -> float:
    """The best F1 of sets of words over the answer's spans, divided by the number of spans.

    A span with numbers scores 0 unless the prediction has one of them. Rounded to two decimals.
    """
    spans = [answer] if isinstance(answer, str) else answer
    predicted = set(drop_words(prediction))
    best = max(_bag_f1(predicted, set(drop_words(span))) for span in spans)
    # The official script rounds by numpy, to 0.08 from 0.075, where Python's `round` has 0.07.
    return float(np.round(best / len(spans), 2))


def _bag_f1(predicted: set[str], right: set[str]) -> float:
    numbers = {word for word in right if _is_number(word)}
    if numbers and not numbers & predicted:
        return 0.0
    common = len(predicted & right)
    precision = common / len(predicted) if predicted else 1.0
    recall = common / len(right) if right else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def best_of(score: Callable[[str, Any], float], completions: Sequence[Any], answers: Any) -> Any:
    """For each completion, its best score among its answers."""
    return [max(score(text_of(c), a) for a in own) for c, own in zip(completions, answers)]


def f1(prompts: Any, completions: Any, answers: Any, **columns: Any) -> list[float]:
    """A reward: SQuAD's F1, the best among an example's `answers`."""
    return best_of(squad_f1, completions, answers)


def exact_match(prompts: Any, completions: Any, answers: Any, **columns: Any) -> list[float]:
    """A reward: 1.0 if SQuAD's exact match holds for any of an example's `answers`, else 0.0."""
    return best_of(squad_exact_match, completions, answers)


def text_of(completion: Any) -> str:
    """A completion's text; of a list of messages, the last one's."""
    return completion if isinstance(completion, str) else completion[-1]["content"]
