"""The examples that the command line's data arguments name."""

from functools import partial
from pathlib import Path

from zo_peft.data import make_examples, read_rows
from zo_peft.data.examples import Row
from zo_peft.data.tasks import (
    TASKS,
    examples,
    hub_rows,
    sample,
    task_rows,
    train_parts,
    with_demonstrations,
)
from zo_peft.errors import UserError
from zo_peft.runs.arguments import DataArguments

Examples = list[Row]


def training_examples(
    data: DataArguments, classifies: bool, generates: bool, seed: int
) -> tuple[Examples, Examples | None]:
    """Examples to train on, and a benchmark task's examples to validate on.

    Args:
        classifies: for a sequence-classification head.
        generates: for rewards of completions.
        seed: of a task's random choice of examples.

    Raises:
        UserError: there are none, or they cannot be read or used.
    """
    if data.task is None:
        made = _own_examples(data, "train", classifies, generates)
        if made is None:
            raise UserError("nothing to train on; give --train_file, --dataset_name or --task")
        return made, None
    rows = task_rows(data.task, data.task_data_dir, 0)
    train, dev = train_parts(data.task, rows, data.num_train, data.num_dev, seed)
    task = TASKS[data.task]
    own = task.example if generates else task.training_example
    kinds = (task.classified,) * 2 if classifies else (own, task.example)
    trained, validated = (examples(data.task, r, k) for r, k in zip((train, dev), kinds))
    return trained, validated


def evaluation_examples(data: DataArguments, classifies: bool, generates: bool) -> Examples | None:
    """Examples to evaluate on, of a task its test examples; None where none are given.

    Raises:
        UserError: they cannot be read or used.
    """
    if data.task is None:
        return _own_examples(data, "eval", classifies, generates)
    task = TASKS[data.task]
    rows = sample(task_rows(data.task, data.task_data_dir, 1), data.num_eval)
    made = examples(data.task, rows, task.classified if classifies else task.example)
    if data.shots == 0:
        return made
    if classifies:
        raise UserError("--shots is for language models, CAUSAL_LM")
    shown = sample(task_rows(data.task, data.task_data_dir, 0), data.shots)
    return list(map(partial(with_demonstrations, task, shown=shown), made))


def _own_examples(
    data: DataArguments, part: str, classifies: bool, generates: bool
) -> Examples | None:
    """Of the user's own file or data set: the part `train` or `eval`."""
    path = {"train": data.train_file, "eval": data.eval_file}[part]
    split = {"train": data.dataset_train_split, "eval": data.dataset_test_split}[part]
    if path is not None:
        source, rows = Path(path).name, read_rows(path)
    elif data.dataset_name is not None and split is not None:
        source = data.dataset_name
        rows = hub_rows(source, data.dataset_config, split)
    else:
        return None
    return make_examples(
        rows,
        source=source,
        prompt_template=data.prompt_template,
        label_column=data.label_column,
        label_words=data.words(),
        classifies=classifies,
        generates=generates,
    )
