"""User data: files to rows, rows to examples, examples to token ids, token ids to batches.

An example has one of these forms (the columns of the data set that `ZOTrainer` takes):

* `prompt`, `completion`: language modelling on the completion;
* `messages`: the same through the tokenizer's chat template, on all turns of the assistant;
* `text`: language modelling on all of it;
* `prompt`, `options`, `label`: classification by the likelihood of each option after the prompt;
* `prompt`, `answers`: a completion is generated and compared with the answers;
* `prompt` and any other columns: a completion is generated, and reward functions get it with the
  columns;
* `text`, `label`: classification by the head of a sequence-classification model;
* `input_ids`, `labels`: already tokenized, with -100 (or one class index) as transformers has it.

Beside `options`, `also_right` lists the indices of options that are right, too, in evaluation. A
`passage` beside them names the part of `prompt` or `text` whose end is cut where the whole is too
long. Pairs of a preferred and a rejected answer are no form here: their losses (as DPO's) need a
reference model beside the one that is tuned.
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
