"""User data: files to rows, rows to examples, examples to token ids, token ids to batches.

`ZOTrainer` takes a data set of examples. The columns of an example make one of these forms:

* `prompt`, `completion`: language modelling, with the loss on the completion;
* `messages`: a conversation, which the tokenizer's chat template turns into text; the loss is on
  all turns of the assistant;
* `text`: language modelling on the whole text;
* `prompt`, `options`, `label`: classification by the likelihood of each option after the prompt;
* `prompt`, `answers`: a completion is generated and compared with the answers;
* `prompt` and any other columns: a completion is generated and passed to reward functions, with
  the columns;
* `text`, `label`: classification by the head of a sequence-classification model;
* `input_ids`, `labels`: tokenized already. As in transformers, a label of -100 is ignored. For a
  classification head, `labels` is one class index.

In evaluation several options may be right: `also_right` lists the indices of those beside `label`.
A `passage` names the part of `prompt` or `text` that is cut at its end where the whole is too long.
Pairs of a preferred and a rejected answer are not supported, because their losses, such as DPO's,
need a reference model in addition to the model that is tuned.
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
