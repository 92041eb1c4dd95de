"""User data: files to rows, rows to examples, examples to token ids, token ids to batches.

An example has one of these forms (the columns of the data set that `ZOTrainer` takes):

* `prompt`, `completion`: language modelling on the completion;
* `messages`: the same through the tokenizer's chat template; the last message is the completion;
* `prompt`, `options`, `label`: classification by the likelihood of each option after the prompt;
* `text`, `label`: classification by the head of a sequence-classification model;
* `input_ids`, `labels`: already tokenized, with -100 (or one class index) as transformers has it.
"""

from zo_peft.data.collate import Collator, collator_for
from zo_peft.data.examples import make_examples, read_rows
from zo_peft.data.tokenize import Tokenization, tokenize_dataset

__all__ = [
    "Collator",
    "Tokenization",
    "collator_for",
    "make_examples",
    "read_rows",
    "tokenize_dataset",
]
