"""F1 and exact match of generated answers, as SQuAD and DROP officially define them.

SQuAD: Rajpurkar et al., arXiv:1606.05250, evaluation script v1.1. DROP: Dua et al.,
arXiv:1903.00161, `drop_eval.py`. A generated answer is one span of text.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

_PUNCTUATION = str.maketrans("", "", string.punctuation)

#: A right answer of DROP: one span of text, or several spans that belong together.
Spans = str | Sequence[str]


def squad_words(text: str) -> list[str]:
    """The words that SQuAD compares: lower case, without punctuation and articles."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


def squad_exact_match(prediction: str, answer: str) -> float:
    """1.0 where prediction and answer have the same words in the same order, else 0.0."""
    return float(squad_words(prediction) == squad_words(answer))


def squad_f1(prediction: str, answer: str) -> float:
    """The harmonic mean of precision and recall of words, each counted as often as it occurs."""
    predicted, right = squad_words(prediction), squad_words(answer)
    common = sum((Counter(predicted) & Counter(right)).values())
    return 2 * common / (len(predicted) + len(right)) if common else 0.0


def drop_words(text: str) -> list[str]:
    """The words that DROP compares: as for SQuAD, but numbers keep their signs and points.

    Spaces and hyphens separate words. A number is written as Python writes a float.
    """
    words: list[str] = []
    for token in re.split("[ -]", text.lower()):
        token = token if _is_number(token) else token.translate(_PUNCTUATION)
        token = str(float(token)) if _is_number(token) else token
        words += re.sub(r"\b(a|an|the)\b", " ", token).split()
    return words


def drop_exact_match(prediction: str, answer: Spans) -> float:
    """1.0 where the answer is one span with the prediction's words in order, else 0.0."""
    spans = [answer] if isinstance(answer, str) else answer
    return float([drop_words(span) for span in spans] == [drop_words(prediction)])


def drop_f1(prediction: str, answer: Spans) -> float:
    """F1 of the sets of words with the best span, over the number of spans, to two decimals.

    A span with numbers counts only where the prediction has one of its numbers.
    """
    spans = [answer] if isinstance(answer, str) else answer
    predicted = set(drop_words(prediction))
    best = max(_bag_f1(predicted, set(drop_words(span))) for span in spans)
    # The official script rounds as numpy does: 0.075 becomes 0.08, but 0.07 in Python.
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


def answer_reward(
    name: str, score: Callable[[str, Any], float], first_line: bool = False
) -> Callable[..., list[float]]:
    """A reward function of that name: each completion's best score with one of its `answers`.

    With `first_line` its first line alone is scored, without white space around it.
    """

    def reward(prompts: Any, completions: Any, answers: Any, **columns: Any) -> list[float]:
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        if first_line:
            texts = [text.split("\n")[0].strip() for text in texts]
        right = [[own] if isinstance(own, str) else own for own in answers]
        return [max(score(text, answer) for answer in own) for text, own in zip(texts, right)]

    reward.__name__ = reward.__qualname__ = name
    reward.__doc__ = score.__doc__
    return reward


f1 = answer_reward("f1", squad_f1)
exact_match = answer_reward("exact_match", squad_exact_match)
