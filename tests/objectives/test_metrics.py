"""F1 and exact match of answers, beside a second reading of SQuAD's and DROP's definitions."""

import random
import re
import string
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from zo_peft.data.tasks import TASKS
from zo_peft.objectives.metrics import (
    drop_exact_match,
    drop_f1,
    drop_words,
    exact_match,
    f1,
    squad_exact_match,
    squad_f1,
    squad_words,
)

Scores = tuple[float, float]

# ---- The official definitions, written independently of zo_peft.objectives.metrics --------------

ARTICLE = re.compile(r"\b(a|an|the)\b", re.UNICODE)


def without_punctuation(text: str) -> str:
    return "".join(letter for letter in text if letter not in string.punctuation)


def without_articles(text: str) -> str:
    return " ".join(ARTICLE.sub(" ", text).split())


def official_squad(prediction: str, answer: str) -> Scores:
    """Exact match and F1 of evaluate-v1.1.py."""
    found, right = (
        without_articles(without_punctuation(text.lower())) for text in (prediction, answer)
    )
    exact = float(found == right)
    found_tokens, right_tokens = found.split(), right.split()
    counts, same = Counter(right_tokens), 0
    for token in found_tokens:
        if counts[token] > 0:
            counts[token] -= 1
            same += 1
    if same == 0:
        return exact, 0.0
    precision, recall = same / len(found_tokens), same / len(right_tokens)
    return exact, 2 * precision * recall / (precision + recall)


def number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def drop_part(token: str) -> str:
    """One token of a DROP answer: a number may become one only when its punctuation is gone."""
    token = token.lower()
    if number(token) is None:
        token = without_punctuation(token)
    value = number(token)
    return without_articles(token if value is None else str(value))


def drop_normal(span: str) -> str:
    parts = [drop_part(token) for token in re.split(r"[ ]|-", span)]
    return " ".join(part for part in parts if part)


def drop_pair(predicted: set[str], gold: set[str]) -> float:
    """F1 of two bags; 0 where the gold bag has numbers and none of them is predicted."""
    numbers = {word for word in gold if number(word) is not None}
    if numbers and numbers.isdisjoint(word for word in predicted if number(word) is not None):
        return 0.0
    same = len(predicted & gold)
    precision = same / len(predicted) if predicted else 1.0
    recall = same / len(gold) if gold else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def official_drop(predicted: list[str], gold: list[str]) -> Scores:
    """Exact match and F1 of drop_eval.py, which aligns spans one to one."""
    found, right = [drop_normal(span) for span in predicted], [drop_normal(span) for span in gold]
    exact = float(set(found) == set(right) and len(found) == len(right))
    table = np.array([[drop_pair(set(f.split()), set(r.split())) for f in found] for r in right])
    rows, columns = linear_sum_assignment(table, maximize=True)
    scores = np.zeros(max(table.shape))
    scores[rows] = table[rows, columns]
    # A numpy float rounds in its own way.
    return exact, float(round(np.mean(scores), 2))


# ---- Hand-worked ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The Cat, a dog & an owl.", ["cat", "dog", "owl"]),
        ("Theatre analysis", ["theatre", "analysis"]),
        ("U.S.A.", ["usa"]),
        ("the-cat", ["thecat"]),
        ("$1,000.50", ["100050"]),
        ("l'a été — «a»", ["la", "été", "—", "«", "»"]),
        (" \t\n", []),
        ("A. The!", []),
    ],
)
def test_squads_words(text: str, words: list[str]) -> None:
    assert squad_words(text) == words


@pytest.mark.parametrize(
    ("prediction", "answer", "exact", "score"),
    [
        ("the Denver Broncos!", "Denver Broncos", 1, 1),
        ("Broncos Denver", "Denver Broncos", 0, 1),
        # 1 word in common, of 3 and of 1: precision 1/3, recall 1.
        ("in the year 1999", "1999", 0, 1 / 2),
        # 2 in common, of 4 and of 3.
        ("one two two three", "two two four", 0, 4 / 7),
        # A word counts as often as it occurs on both sides.
        ("two two two", "two", 0, 1 / 2),
        ("Carolina", "Denver", 0, 0),
        ("", "Denver", 0, 0),
        # Nothing is left of either: they match, and have no word in common.
        ("the", "a", 1, 0),
    ],
)
def test_squads_scores(prediction: str, answer: str, exact: float, score: float) -> None:
    assert squad_exact_match(prediction, answer) == exact
    assert squad_f1(prediction, answer) == pytest.approx(score)
    assert official_squad(prediction, answer) == (exact, pytest.approx(score))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The Cat, a dog.", ["cat", "dog"]),
        ("27-yard", ["27.0", "yard"]),
        ("3.50", ["3.5"]),
        # No float as it stands, so its punctuation goes first.
        ("1,000", ["1000.0"]),
        ("$5", ["5.0"]),
        ("12.5%", ["125.0"]),
        ("-2", ["2.0"]),
        ("+2 1e3 .5", ["2.0", "1000.0", "0.5"]),
        ("1st", ["1st"]),
        ("four", ["four"]),
        ("the-end", ["end"]),
        ("one\ttwo\nthree", ["one", "two", "three"]),
        # Only spaces and hyphens part tokens: this one is no float.
        ("3\t4", ["3", "4"]),
        ("nan inf", ["nan", "inf"]),
        ("1_000", ["1000.0"]),
        ("٣", ["3.0"]),
        ("½ 10\u20137", ["½", "10\u20137"]),
        ("a - the", []),
    ],
)
def test_drops_words(text: str, words: list[str]) -> None:
    assert drop_words(text) == words
    assert drop_normal(text) == " ".join(words)


@pytest.mark.parametrize(
    ("prediction", "answer", "exact", "score"),
    [
        ("the Bears", ["Bears"], 1, 1),
        ("the Bears", "Bears", 1, 1),
        ("1000", ["1,000"], 1, 1),
        ("5 dollars", ["$5"], 0, 0.67),
        # Bags are sets: a word counts once, but the order decides exact match.
        ("two two four", ["two four"], 0, 1),
        ("four two", ["two four"], 0, 1),
        # 2 of 3 words in common, but no number of the answer's.
        ("27 yard pass", ["28 yard pass"], 0, 0),
        ("yard pass", ["28 yard pass"], 0, 0),
        ("28 yard pass", ["yard pass"], 0, 0.8),
        ("7 or 8", ["8"], 0, 0.5),
        # One span of two: its F1 of 1 is halved, and it is no exact match.
        ("Bears", ["Bears", "Lions"], 0, 0.5),
        ("Bears, Lions", ["Bears", "Lions"], 0, 0.33),
        ("Bears", ["Lions", "Bears", "Bears"], 0, 0.33),
        ("", ["Bears"], 0, 0),
        ("the", ["a"], 1, 1),
        # 3 words in common, of 8 and of 8: 0.375, a fifth of which is 0.075.
        ("a1 a2 a3 b4 b5 b6 b7 b8", ["a1 a2 a3 c4 c5 c6 c7 c8", "d", "e", "f", "g"], 0, 0.08),
    ],
)
def test_drops_scores(prediction: str, answer: str | list[str], exact: float, score: float) -> None:
    assert (drop_exact_match(prediction, answer), drop_f1(prediction, answer)) == (exact, score)
    spans = [answer] if isinstance(answer, str) else answer
    assert official_drop([prediction], spans) == (exact, score)


def test_the_second_reading_aligns_several_predicted_spans() -> None:
    """Else it would be no check of the case of one span, which is all that is generated."""
    assert official_drop(["Lions", "Bears"], ["Bears", "Lions"]) == (1, 1)
    assert official_drop(["Bears", "Bears"], ["Bears"]) == (0, 0.5)
    assert official_drop(["Green Bay", "Green"], ["Green", "Green Bay"]) == (1, 1)


# ---- Agreement --------------------------------------------------------------------------------

WORDS = [
    *("the", "a", "an", "The", "A.", "Bears", "bears'", "lion", "U.S.", "isn't", "été", "naïve"),
    *("1,000", "1000", "3.5", "3.50", "$5", "5", "-2", "2", "20%", "1e3", "1st", "(7)", "٣"),
    *("yard-line", "27-yard", "half-time", "\u2013", "İzmir", "", "\t", "\n"),
]


def phrase(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(0, 6)))


def near(rng: random.Random, text: str) -> str:
    """The text with some words changed, moved, dropped or added, or as it is."""
    words = text.split(" ")
    for _ in range(rng.choice([0, 0, 1, 1, 2, 3])):
        place = rng.randrange(len(words))
        change = rng.randrange(6)
        if change == 0:
            words[place] = rng.choice(WORDS)
        elif change == 1 and len(words) > 1:
            del words[place]
        elif change == 2:
            words.insert(place, rng.choice(["the", "a", "2", "Lions,"]))
        elif change == 3:
            rng.shuffle(words)
        elif change == 4:
            words[place] = words[place].upper() + rng.choice([".", "!", ""])
        else:
            words[place] = f"{words[place]}-{words[place]}"
    return " ".join(words)


def pairs(seed: int, spans: int) -> list[tuple[str, list[list[str]]]]:
    """400 predictions, each with one to three answers of up to `spans` spans."""
    rng, made = random.Random(seed), []
    for _ in range(400):
        answers = [
            [phrase(rng) for _ in range(rng.randint(1, spans))] for _ in range(rng.randint(1, 3))
        ]
        made.append((near(rng, rng.choice(rng.choice(answers))), answers))
    return made


def spread(scores: list[Scores]) -> tuple[int, int, int]:
    """How many match exactly, partly, and not at all."""
    exact = sum(e == 1 for e, _ in scores)
    return exact, sum(0 < s < 1 for _, s in scores), sum(s == 0 for _, s in scores)


def test_squads_scores_are_the_official_ones() -> None:
    scores = []
    for prediction, answers in pairs(0, spans=1):
        for (answer,) in answers:
            official = official_squad(prediction, answer)
            exact, score = squad_exact_match(prediction, answer), squad_f1(prediction, answer)
            assert (exact, score) == (official[0], pytest.approx(official[1], abs=1e-12))
            scores.append(official)
    assert min(spread(scores)) > 80


def test_drops_scores_are_the_official_ones() -> None:
    scores = []
    for prediction, answers in pairs(1, spans=4):
        for answer in answers:
            official = official_drop([prediction], answer)
            assert (drop_exact_match(prediction, answer), drop_f1(prediction, answer)) == official
            scores.append(official)
    assert min(spread(scores)) > 40


TEXT = st.text("ab the1.5,-$\t'é", max_size=12) | st.lists(st.sampled_from(WORDS)).map(" ".join)


@given(TEXT, TEXT)
def test_squads_scores_of_any_text(prediction: str, answer: str) -> None:
    scores = squad_exact_match(prediction, answer), squad_f1(prediction, answer)
    assert scores == pytest.approx(official_squad(prediction, answer), abs=1e-12)


@given(TEXT, st.lists(TEXT, min_size=1, max_size=5))
def test_drops_scores_of_any_text(prediction: str, answer: list[str]) -> None:
    scores = drop_exact_match(prediction, answer), drop_f1(prediction, answer)
    assert scores == official_drop([prediction], answer)


# ---- Over several answers, as rewards ---------------------------------------------------------


@pytest.mark.parametrize("name", ["squad", "drop"])
def test_a_tasks_score_is_the_best_over_its_answers(name: str) -> None:
    """Each of F1 and exact match by itself, of the completion's first line."""
    rewards = TASKS[name].rewards
    assert [getattr(reward, "__name__", "") for reward in rewards] == ["f1", "exact_match"]
    made = [
        (prediction.replace("\n", " "), answers)
        for prediction, answers in pairs(2, spans=3 if name == "drop" else 1)
    ]
    completions = [f" {prediction}\nQuestion: the Bears" for prediction, _ in made]
    if name == "drop":
        expected = [[official_drop([p], answer) for answer in own] for p, own in made]
        given = [own for _, own in made]
    else:
        expected = [[official_squad(p, answer) for (answer,) in own] for p, own in made]
        given = [[answer for (answer,) in own] for _, own in made]
    found = [reward(prompts=None, completions=completions, answers=given) for reward in rewards]
    assert found[0] == pytest.approx([max(f for _, f in scores) for scores in expected], abs=1e-12)
    assert found[1] == [max(e for e, _ in scores) for scores in expected]


def test_a_drop_answer_has_alternatives_of_several_spans_each() -> None:
    def scores(answers: list[list[str]]) -> list[float]:
        given = {"prompts": [""], "completions": ["Bears"], "answers": [answers]}
        return [reward(**given)[0] for reward in TASKS["drop"].rewards]

    assert scores([["Bears", "Lions"], ["Bears won"], ["the Bears"]]) == [1, 1]
    assert scores([["Bears", "Lions"], ["Bears won"]]) == [0.67, 0]


def test_rewards_of_the_same_names_read_the_whole_completion() -> None:
    turns = [[{"role": "assistant", "content": "the Bears"}], "two\nBears", "Lions"]
    answers = [["Lions", "Bears"], ["Bears"], ["Bears", "Wolves"]]
    assert f1(None, turns, answers) == [1.0, pytest.approx(2 / 3), 0.0]
    assert exact_match(None, turns, answers) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("name", ["squad", "drop"])
def test_an_answer_ends_with_its_line(name: str) -> None:
    """Where MeZO's generation ends, also where nothing is on the line."""
    completions = ["Green Bay", " Green Bay \nQuestion: who", "\nGreen Bay", "Green\nBay"]
    answers = [["Green Bay"] if name == "squad" else [["Green Bay"]]] * 4
    given = {"prompts": None, "completions": completions, "answers": answers}
    score, exact = (reward(**given) for reward in TASKS[name].rewards)
    assert score == pytest.approx([1, 1, 0, 2 / 3 if name == "squad" else 0.67])
    assert exact == [1, 1, 0, 0]
