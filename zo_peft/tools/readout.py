"""`zo-peft readout`: the best linear head on the states of a frozen base, or of an adapted one.

It takes a forward pass for each batch and changes no weight, so it is what tuning has to beat:
where it solves a task, the task says nothing about an adapter.
"""

import math
import time
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zo_peft.core.batch import Batch
from zo_peft.errors import UserError
from zo_peft.models.memory import peak_memory_bytes
from zo_peft.objectives.scoring import ClassificationObjective
from zo_peft.runs.arguments import DataArguments, ModelArguments
from zo_peft.runs.run import examples_of, resumes, trainer_of
from zo_peft.train.base import BaseTrainer
from zo_peft.train.config import ZOConfig
from zo_peft.train.results import METRICS_NAME, write_json

#: The strategy that `zo_metrics.json` names.
READOUT = "readout"

#: The penalties that are tried, and the share of the rows that chooses among them.
PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
HELD_OUT = 0.2

#: What a readout sees of rows: states [N, d] and offsets [N, K], both float64, and labels [N].
Seen = Sequence[Tensor]


def readout(model: ModelArguments, data: DataArguments, args: ZOConfig) -> dict[str, Any]:
    """Fit the head on the training data, one pass for each batch, as far as the budget goes.

    Returns what `zo_metrics.json` in `output_dir` then holds: the metric and the loss on the
    evaluation data before and after, and what was spent. A UserError says that there are no
    evaluation data, or the task is not one of label words of one token or of classes, or an engine
    computes the base.
    """
    if args.engine is not None:
        raise UserError("an engine tells no hidden states; give the float model, or no readout")
    if args.chooses_folder:
        args.output_dir = f"{Path(model.model_name_or_path).resolve().name}-readout"
    resumes(model, args)
    train, _, test = examples_of(model, data, args)
    if test is None:
        raise UserError("nothing to evaluate on; give a file, --dataset_test_split or --task")
    trainer = trainer_of(BaseTrainer, model, data, args, train, test)
    before = trainer.evaluate()
    name = f"eval_{trainer.metric_name}"
    v, passes = fit(trainer, args.max_forward_passes)
    after = seen(trainer, trainer.get_eval_dataloader())
    right = (after[1] + after[0] @ v.T).argmax(dim=1) == after[2]
    found = {
        "strategy": READOUT,
        "steps": 0,
        "forward_passes": passes,
        "examples_forwarded": min(passes * args.per_device_train_batch_size, len(train)),
        "train_examples": len(train),
        "eval_examples": len(test),
        "wall_seconds": round(time.time() - psutil.Process().create_time(), 2),
        "peak_memory_bytes": peak_memory_bytes(),
        "metric_name": trainer.metric_name,
        "metric_before": before[name],
        "metric_after": right.double().mean().item(),
        "eval_loss_before": before["eval_loss"],
        "eval_loss_after": readout_loss(after, v).item(),
    }
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    write_json(Path(args.output_dir) / METRICS_NAME, found)
    return found


def fit(trainer: BaseTrainer, most: int | None = None) -> tuple[Tensor, int]:
    """Fit V on at most so many training batches; returns it [K, d] and how many there were.

    The penalty is the best on rows that are held out; then all rows count.
    """
    known = seen(trainer, batches := [*islice(trainer.get_train_dataloader(), most)])
    count = math.floor(len(known[2]) * (1 - HELD_OUT))
    kept, held = [part[:count] for part in known], [part[count:] for part in known]
    penalty = min(PENALTIES, key=lambda tried: readout_loss(held, fitted(kept, tried)).item())
    return fitted(known, penalty), len(batches)


@torch.no_grad()
def seen(trainer: BaseTrainer, batches: Iterable[Any]) -> Seen:
    """What the head of the frozen model sees of batches.

    With label words, the states are those at the scored positions, and their logits the offsets. A
    head for classes is new: its offsets are zero, and the states have a constant for its bias. A
    UserError says that the batches have neither.
    """
    objective: Any = trainer.eval_objective
    model, classifies = trainer.model.eval(), isinstance(objective, ClassificationObjective)
    count = model.config.num_labels
    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == count]
    head = heads[-1] if classifies else model.get_output_embeddings()
    found: list[tuple[Tensor, ...]] = []
    calls: list[tuple[Tensor, Tensor]] = []
    with head.register_forward_hook(lambda _, x, y: calls.append((x[0], y))):
        for batch in map(Batch, batches):
            if not (classifies or _has_words(batch)):
                what = "a readout needs label words of one token, the same in all rows"
                cure = "give shorter --label_words, or --task_type SEQ_CLS"
                raise UserError(f"{what}, and here they are longer or differ; {cure}")
            offsets = objective.scores(model, batch)
            states, logits = calls.pop()
            if classifies and states.ndim == 3:
                # The head of a decoder sees all tokens. The model takes one of each row.
                at = (logits.float() - offsets[:, None]).abs().sum(dim=2).argmin(dim=1)
                states = states[range(len(at)), at]
            if classifies:
                states, offsets = F.pad(states, (0, 1), value=1.0), torch.zeros_like(offsets)
            found.append((states.double(), offsets.double(), batch["labels"]))
    return [torch.cat(parts) for parts in zip(*found)]


def _has_words(batch: Batch) -> bool:
    """Whether the examples of a batch have the same options, of one token, and one is right."""
    if "option_tokens" not in batch or "is_right" in batch:
        return False
    return len(batch["option_tokens"].unique(dim=0)) == 1


def fitted(rows: Seen, penalty: float) -> Tensor:
    """The V [K, d] of least `mean cross entropy(offsets + V h) + penalty * mean |h|^2 |V|^2`."""
    states, offsets, _ = rows
    scale = penalty * states.square().sum(dim=1).mean()
    v = states.new_zeros(offsets.shape[1], states.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([v], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = readout_loss(rows, v) + scale * v.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return v.detach()


def readout_loss(rows: Seen, v: Tensor) -> Tensor:
    """The mean cross entropy of rows with a fitted V."""
    states, offsets, labels = rows
    return F.cross_entropy(offsets + states @ v.T, labels)
