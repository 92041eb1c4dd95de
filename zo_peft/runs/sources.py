"""The examples that the command line's data arguments name."""

import sys
from pathlib import Path

from zo_peft.data import make_examples, read_rows
from zo_peft.data.examples import column_of, converted, find_words, options_of, write_words
from zo_peft.data.forms import Row, called, check_layout, form_of
from zo_peft.data.tasks import TASKS, hub_rows, sample, task_rows, train_parts, with_demonstrations
from zo_peft.errors import UserError
from zo_peft.runs.arguments import DataArguments


def training_examples(
    data: DataArguments, classifies: bool, generates: bool, seed: int
) -> tuple[list[Row], list[Row] | None]:
    """Examples to train on and, for a benchmark task, examples to validate on; or a UserError.

    Args:
        classifies: make examples for a sequence-classification head.
        generates: make examples for rewards of generated completions.
        seed: decides which of a task's examples are taken.
    """
    if data.task is None:
        made = _own_examples(data, data.train_file, data.dataset_train_split, classifies, generates)
        if made is None:
            raise UserError("nothing to train on; give --train_file, --dataset_name or --task")
        return made, None
    task, rows = TASKS[data.task], task_rows(data.task, data.task_data_dir, 0)
    train, dev = train_parts(data.task, rows, data.num_train, data.num_dev, seed)
    evaluated = task.classified if classifies else task.example
    trained = evaluated if classifies or generates else task.training_example
    return converted(data.task, train, trained), converted(data.task, dev, evaluated)


def evaluation_examples(data: DataArguments, classifies: bool, generates: bool) -> list[Row] | None:
    """Examples to evaluate on, or None if there are none; those of a task are its test examples."""
    if data.task is None:
        return _own_examples(data, data.eval_file, data.dataset_test_split, classifies, generates)
    task = TASKS[data.task]
    rows = sample(task_rows(data.task, data.task_data_dir, 1), data.num_eval)
    made = converted(data.task, rows, task.classified if classifies else task.example)
    if data.shots == 0:
        return made
    if classifies:
        raise UserError("--shots is for language models, CAUSAL_LM")
    shown = sample(task_rows(data.task, data.task_data_dir, 0), data.shots)
    return [with_demonstrations(task, example, shown) for example in made]


def own_rows(
    data: DataArguments, path: str | None, split: str | None
) -> tuple[str, list[Row]] | None:
    """The name and the rows of the user's own file, or of a split of the user's own data set."""
    if path is not None:
        return Path(path).name, read_rows(path)
    if data.dataset_name is not None and split is not None:
        return data.dataset_name, hub_rows(data.dataset_name, data.dataset_config, split)
    return None


def _own_examples(
    data: DataArguments, path: str | None, split: str | None, classifies: bool, generates: bool
) -> list[Row] | None:
    """Examples of the user's own rows.

    How the first was understood is said on stderr and written into `data`, to hold for the others.
    """
    found = own_rows(data, path, split)
    if found is None:
        return None
    source, rows = found
    check_layout(rows, source)
    _find_words(data, rows, source, classifies, generates)
    template, column, words = data.prompt_template, data.label_column, data.given_words()
    made = make_examples(rows, source, template, column, words, classifies, generates)
    given, read = called(form_of(rows[0])), called(form_of(made[0]))
    what = read if template or classifies or given == read else f"{given}, read as {read}"
    if words and not generates:
        named = ", ".join(map(repr, options_of(words)))
        what = f"label words of column {column or 'label'!r}: {named}"
    print(f"{source}: {len(rows):,} rows, {what}", file=sys.stderr)
    return made


def _find_words(
    data: DataArguments, rows: list[Row], source: str, classifies: bool, generates: bool
) -> None:
    """Write label words of the rows, and a template for text + label, into `data` that has none."""
    column, asked = data.label_column or "label", data.label_words == ["auto"]
    has_template = data.prompt_template is not None
    is_pair = form_of(rows[0]) == ("text", "label") and not (has_template or classifies)
    wanted = (has_template or is_pair or classifies) and not generates
    if asked or (wanted and data.label_words is None):
        labels, where = column_of(rows, column), f"{source}: column {column!r}"
        if not (asked or classifies) and {type(label) for label in labels} == {bool}:
            raise UserError(f"{where} has truth values; give their words, --label_words no,yes")
        words = find_words(labels, where, asked, classifies or column == "label")
        data.label_words = ["none"] if words is None else write_words(words)
    if is_pair and not generates and data.words() is not None:
        data.prompt_template = "{text}"
