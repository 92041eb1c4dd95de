"""User data: files to rows, rows to examples, examples to token ids, token ids to batches.

`ZOTrainer` takes a data set of examples, all of one form: a list of dictionaries, a `Dataset` or an
`IterableDataset`. The columns of an example make one of these forms:

* `prompt`, `completion`: language modelling, with the loss on the completion. Both are text, or
  both are messages, which the tokenizer's chat template turns into text;
* `messages`: a conversation; the loss is on all turns of the assistant, less those with a `weight`
  of 0. A column `tools` goes to the chat template;
* `text`: language modelling on the whole text;
* `prompt`, `options`, `label`: classification by the likelihood of each option after the prompt;
* `prompt`, `answers`: a completion is generated and compared with the answers;
* `prompt` and any other columns: a completion is generated and passed to reward functions, with
  the columns;
* `text`, `label`: classification by the head of a sequence-classification model;
* `input_ids`, `labels`: tokenized already. As in transformers, a label of -100 is ignored, and an
  `attention_mask` of 0 hides padding. For a classification head, `labels` is one class index.

Every value of these columns is used as meant, or refused by row and column (`zo_peft.data.forms`).
A warning names the columns that are not used.
In evaluation several options may be right: `also_right` lists the indices of those beside `label`.
A `passage` names the part of `prompt` or `text` that is cut at its end where the whole is too long.
Pairs of a preferred and a rejected answer are not supported, because their losses, such as DPO's,
need a reference model in addition to the model that is tuned.
"""

from zo_peft.data.collate import Collator, collator_for
from zo_peft.data.examples import make_examples
from zo_peft.data.files import read_rows
from zo_peft.data.tokenize import Tokenization, tokenize_dataset

__all__ = [
    "Collator",
    "Tokenization",
    "collator_for",
    "make_examples",
    "read_rows",
    "tokenize_dataset",
]
