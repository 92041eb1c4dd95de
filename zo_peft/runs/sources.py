"""The examples that the command line's data arguments name."""

from pathlib import Path

from zo_peft.data import make_examples, read_rows
from zo_peft.data.examples import converted
from zo_peft.data.forms import Row
from zo_peft.data.tasks import TASKS, hub_rows, sample, task_rows, train_parts, with_demonstrations
from zo_peft.errors import UserError
from zo_peft.runs.arguments import DataArguments

Examples = list[Row]


def training_examples(
    data: DataArguments, classifies: bool, generates: bool, seed: int
) -> tuple[Examples, Examples | None]:
    """Examples to train on and, for a benchmark task, examples to validate on; or a UserError.

    Args:
        classifies: make examples for a sequence-classification head.
        generates: make examples for rewards of generated completions.
        seed: decides which of a task's examples are taken.
    """
    if data.task is None:
        split = data.dataset_train_split
        made = _own_examples(data, data.train_file, split, classifies, generates)
        if made is None:
            raise UserError("nothing to train on; give --train_file, --dataset_name or --task")
        return made, None
    task, rows = TASKS[data.task], task_rows(data.task, data.task_data_dir, 0)
    train, dev = train_parts(data.task, rows, data.num_train, data.num_dev, seed)
    evaluated = task.classified if classifies else task.example
    trained = evaluated if classifies or generates else task.training_example
    return converted(data.task, train, trained), converted(data.task, dev, evaluated)


def evaluation_examples(data: DataArguments, classifies: bool, generates: bool) -> Examples | None:
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


def _own_examples(
    data: DataArguments, path: str | None, split: str | None, classifies: bool, generates: bool
) -> Examples | None:
    """Examples of the user's own file, or of a split of the user's own data set."""
    if path is not None:
        source, rows = Path(path).name, read_rows(path)
    elif data.dataset_name is not None and split is not None:
        source, rows = data.dataset_name, hub_rows(data.dataset_name, data.dataset_config, split)
    else:
        return None
    template, column = data.prompt_template, data.label_column
    return make_examples(rows, source, template, column, data.words(), classifies, generates)
