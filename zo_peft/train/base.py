"""What forward-only tuning and its gradient baseline share: model, data, evaluation, saving."""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import HfApi
from peft import PeftConfig, PeftModel, TaskType
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import EvalPrediction, Trainer, set_seed, trainer_callback
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import HubStrategy, PredictionOutput, TrainOutput, has_length
from transformers.utils import PushInProgress

from zo_peft.core.batch import Batch, Objective
from zo_peft.core.lanes import replaced
from zo_peft.data import Collator, Tokenization, collator_for, tokenize_dataset
from zo_peft.data.sampler import EpochSampler
from zo_peft.data.tokenize import Features, classes_of, is_tokenized
from zo_peft.engines import served
from zo_peft.errors import UserError, explained
from zo_peft.models import adapters
from zo_peft.models.hub import AnyModel
from zo_peft.models.loading import load_base, load_tokenizer
from zo_peft.objectives import rewards, scoring
from zo_peft.train.answers import answered, is_chat, questions
from zo_peft.train.card import write_model_card
from zo_peft.train.config import BUILT, ZOConfig
from zo_peft.train.goals import check_goals, kind_of, objective_of
from zo_peft.train.progress import Progress, Totals
from zo_peft.train.results import METRICS_NAME, results, write_json
from zo_peft.train.upload import create_repository, upload


class BaseTrainer(Trainer):
    """A `transformers.Trainer` that loads a model, adds an adapter and reads examples by itself.

    Args:
        model: the name of a base (Hub id or folder; for `args.engine` a file), a loaded base, or a
            `PeftModel` whose adapter is tuned.
        args: the settings; default: `ZOConfig("<model>-zo")`.
        train_dataset, eval_dataset: examples in one of the forms of `zo_peft.data`.
        processing_class: the tokenizer; default: the base's own.
        peft_config: the new adapter. It is None exactly when `model` is a `PeftModel`, or when the
            base itself is tuned (`args.tune`).
        objective: what is minimised. By default `args.objective` says it, or else the model's class
            and the data set's columns.
        reward_funcs: functions of generated completions that are maximised instead, in the form of
            TRL's (`zo_peft.objectives.rewards.RewardObjective`).
        eval_objective: what evaluation reports; default: `objective`, or what `eval_dataset` says.
        data_collator, compute_metrics, callbacks: as in `Trainer`. The default metrics are those
            of the objective: `accuracy` of options or classes, `token_accuracy` of completions, or
            rewards.

    A UserError says that settings, data and model do not go together.
    """

    args: ZOConfig
    #: A trainer that trains must have something to tune; one that only evaluates need not.
    trains: ClassVar[bool] = False
    #: Forwards of a check before the first step, which the budget does not count.
    check_passes = 0
    #: What counts forward passes and examples: the totals, or a `ZOTrainer`'s evaluator.
    spent: Any

    def __init__(
        self,
        model: str | AnyModel,
        args: ZOConfig | None = None,
        data_collator: Callable[..., Batch] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[trainer_callback.TrainerCallback] | None = None,
        peft_config: PeftConfig | None = None,
        objective: Objective | None = None,
        reward_funcs: Sequence[rewards.RewardFunction] = (),
        eval_objective: Objective | None = None,
    ) -> None:
        args = self._checked(args, model, peft_config, train_dataset, objective, reward_funcs)
        if isinstance(train_dataset, Iterator):
            train_dataset = list(train_dataset)
        generates = rewards.generates(reward_funcs, args.objective)
        model, tokenizer = self._load(model, args, processing_class, peft_config, train_dataset)
        self.tokenization = _tokenization(model, tokenizer, args, generates)
        self.engine = served.check_engine(model, args.engine, args.world_size)
        if isinstance(objective, scoring.BlackBoxObjective) and train_dataset is None:
            train, evaluation = Features([{"input_ids": [0], "labels": 0, "length": 1}]), None
        else:
            train, evaluation = map(self.features, (train_dataset, eval_dataset))
        chosen = partial(objective_of, self.tokenization, args, reward_funcs)
        given = eval_objective or objective
        self.evaluated = None if given else kind_of(evaluation or train)
        chats = is_chat(eval_dataset if train_dataset is None else train_dataset)
        self.form = "messages" if chats else kind_of(evaluation or train)
        self.eval_objective = given or chosen(self.evaluated)
        self.objective = objective or chosen(kind_of(train or evaluation))
        # The metric that the evaluation objective puts first.
        self.metric_name = getattr(self.eval_objective, "metric_name", "accuracy")
        accuracy = partial(scoring.accuracy, name=self.metric_name)
        metrics = getattr(self.eval_objective, "metrics", accuracy)
        if compute_metrics is not None:
            metrics = scoring.on_decided(compute_metrics)
        if data_collator is None:
            data_collator = self._collator(model, train, evaluation)
        elif objective is None and train:
            _check_batches(data_collator, train)
        if args.objective == "accuracy":
            self.objective = scoring.AccuracyObjective(self.objective)
        inputs = model, args, data_collator, train, evaluation, tokenizer
        # A logger whose package is not installed raises a RuntimeError.
        refusals = ImportError, OSError, RuntimeError, ValueError
        refused = explained("transformers refuses the settings", *refusals)
        # Trainer refuses to back-propagate through a quantized base.
        with refused, replaced([(model, "is_quantized", False)]):
            super().__init__(*inputs, compute_metrics=metrics, callbacks=callbacks)
        self._count_and_show()
        if train and getattr(peft_config, "prefix_projection", None) is False:
            self._start_prefix(next(iter(train)))
        self.summary: dict[str, Any] = {}
        self.ready()
        self._built = [(own, own is self.args, {**vars(own)}) for own in (args, self.args)]

    def _checked(self, args: Any, model: Any, config: Any, rows: Any, *goals: Any) -> ZOConfig:
        """The settings, or those by default, for this trainer; or a UserError."""
        if args is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            args = ZOConfig(f"{Path(name or 'base').resolve().name}-zo")
        if not isinstance(args, ZOConfig):
            raise UserError(f"args is a {type(args).__name__}; give a ZOConfig, it takes the same")
        if self.trains and args.tune != "adapter" and (config or isinstance(model, PeftModel)):
            why = "tunes the base itself; give no adapter or peft_config"
            raise UserError(f"tune={args.tune!r} {why}")
        kinds: Any = type(None) if isinstance(model, PeftModel) else PeftConfig
        if self.trains and args.tune == "adapter" and not isinstance(config, kinds):
            raise UserError("give either a peft_config (such as a LoraConfig), or a PeftModel")
        check_goals(args, *goals)
        if args.device.type == "cpu":
            args.dataloader_pin_memory = False
        # The collator needs all columns that `tokenize_dataset` makes.
        args.remove_unused_columns = False
        if isinstance(rows, dict):
            parts = ", ".join(map(str, rows))
            raise UserError(f"train_dataset is several data sets ({parts}); give one of them")
        return args

    def _collator(self, model: AnyModel, train: Any, evaluation: Any) -> Collator:
        several = evaluation.values() if isinstance(evaluation, dict) else [evaluation]
        seen = chain.from_iterable(rows for rows in (train, *several) if rows is not None)
        goals, pad = (self.objective, self.eval_objective), self.tokenization.tokenizer.pad_token_id
        model.eval()
        return collator_for(model, pad, *goals, examples=seen)

    def _count_and_show(self) -> None:
        self.totals = self.spent = Totals()
        self.add_callback(self.totals)
        shown = trainer_callback.ProgressCallback, trainer_callback.PrinterCallback
        if any(map(self.pop_callback, shown)):
            bars = sys.stderr.isatty() and not self.args.disable_tqdm
            self.add_callback(Progress(lambda: self.forward_passes, self.metric_name, bars))

    def _start_prefix(self, example: dict[str, Any]) -> None:
        pool = torch.tensor(example.get("prompt_ids") or example["input_ids"])
        choice = torch.randint(len(pool), (self.model.active_peft_config.num_virtual_tokens,))
        adapters.start_prefix_from_tokens(self.model, pool[choice])

    def _load(
        self,
        model: str | AnyModel,
        args: ZOConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        peft_config: PeftConfig | None,
        rows: Any,
    ) -> tuple[AnyModel, PreTrainedTokenizerBase]:
        """The model with its adapter, and the tokenizer; `rows` say how many classes there are."""
        name = model if isinstance(model, str) else model.config.name_or_path
        if isinstance(model, str) and args.engine is not None:
            model, own = served.load_served(model, args.engine, args.tokenizer_name, **args.servers)
            tokenizer = tokenizer or own
        tokenizer = tokenizer or load_tokenizer(name)
        # Trainer seeds too late for this: a new adapter's values are part of the run.
        set_seed(args.seed)
        if isinstance(model, str):
            classifies = peft_config is not None and peft_config.task_type == TaskType.SEQ_CLS
            num_labels = (classes_of(rows) or 2) if classifies else None
            kwargs = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
            model = load_base(model, num_labels, args.tune, **kwargs)
        elif args.model_init_kwargs:
            advice = "a command has --dtype, --load_in_8bit and others"
            raise UserError(f"model_init_kwargs is for a model that is given by name; {advice}")
        self.prepare_base(model, args)
        if peft_config is not None:
            model = adapters.add_adapter(model, peft_config)
        adapters.prepare(model, tokenizer)
        return model, tokenizer

    def features(self, dataset: Any) -> Any:
        """A data set of examples (or several by name, or None) as this trainer's models take it."""
        if isinstance(dataset, dict):
            return {name: self.features(part) for name, part in dataset.items()}
        return None if dataset is None else tokenize_dataset(dataset, self.tokenization)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in Trainer; a data set may also be one of examples, as the constructor takes it."""
        return super().evaluate(self._alike(eval_dataset), *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> PredictionOutput:
        """As in Trainer; a data set may also be one of examples, as the constructor takes it.

        Rows without labels (prompt + options, a prompt, messages of which the last is not the
        assistant's, or for a head of classes a text) are answered: `predictions` are then the
        probabilities [N, K] of the options or classes, 0 where a row has fewer; or greedily
        generated texts [N], and `test_cut` counts those that `max_completion_length` cut.
        """
        if isinstance(test_dataset, Iterator):
            test_dataset = list(test_dataset)
        if (asked := questions(test_dataset, self.tokenization)) is not None:
            return answered(self, asked, *args, **kwargs)
        return super().predict(self._alike(test_dataset), *args, **kwargs)

    def _alike(self, dataset: Any) -> Any:
        if isinstance(dataset, dict):
            return {name: self._alike(part) for name, part in dataset.items()}
        if dataset is None or isinstance(dataset, str):
            return dataset
        features = dataset if is_tokenized(dataset) else self.features(dataset)
        if self.evaluated not in (None, kind_of(features)):
            why = f"these are examples of {kind_of(features)}, but it evaluates {self.evaluated}"
            raise UserError(f"{why}; make the trainer with an eval_dataset of the other kind")
        return features

    def prepare_base(self, model: AnyModel, args: ZOConfig) -> None:
        """A subclass may prepare the base here, before it gets an adapter."""

    def ready(self) -> None:
        """A subclass goes on here, when model, data and objectives are there."""

    @property
    def forward_passes(self) -> int:
        """So far; one is one candidate through one micro-batch, or a third of a backward pass."""
        return self.spent.forward_passes

    @property
    def examples_forwarded(self) -> int:
        """So far; the sum of the examples of all forward passes."""
        return self.spent.examples_forwarded

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in Trainer; logs of a training run also say what has been spent so far."""
        if "learning_rate" in logs:
            logs["forward_passes"] = self.forward_passes
            logs["examples_forwarded"] = self.examples_forwarded
        if "train_loss" in logs:
            logs["train_loss"] = self.totals.train_loss
        if self.totals.seconds is not None:
            logs["seconds"] = round(self.totals.seconds, 3)
        super().log(logs, start_time)

    # ---- The run --------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in Trainer, but its loss is the mean over all steps, also those before it resumed."""
        if self.train_dataset is None:
            raise UserError("there is nothing to train on; give a train_dataset")
        for own, is_read, built in self._built:
            changed = {n for n, value in built.items() if value != getattr(own, n)}
            if changed := changed.intersection(BUILT) if is_read else changed:
                raise UserError(f"{min(changed)} was changed after the trainer was built")
        self.totals.clear()
        result = super().train(*args, **kwargs)
        if not self.state.global_step:
            why = "the training data give no batch, or none that is full (dataloader_drop_last)"
            advice = "lower per_device_train_batch_size, or give more data"
            raise UserError(f"no step was made: {why}; {advice}")
        return result._replace(training_loss=self.totals.train_loss)

    def over(self) -> bool:
        """Whether the run has made all its steps, or early stopping has ended it."""
        early = trainer_callback.EarlyStoppingCallback
        stopping = (c for c in self.callback_handler.callbacks if type(c) is early)
        return self.state.global_step >= self.state.max_steps or any(
            0 < c.early_stopping_patience <= c.early_stopping_patience_counter for c in stopping
        )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As in Trainer, which would make one more step where a run that is over is started."""
        if self.over():
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_callback_state(self) -> None:
        """Callbacks go on where they were at the checkpoint, with what they are given now."""
        kept = self.state.stateful_callbacks
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, trainer_callback.ExportableState):
                state = kept.setdefault(type(callback).__name__, callback.state())
                if isinstance(state, dict):
                    vars(callback).update(state["attributes"])

    def check_metric(self, metrics: dict[str, float]) -> None:
        """Raise a UserError unless the metric of the best model is among those of an evaluation."""
        wanted, known = self.args.metric_for_best_model, [n.removeprefix("eval_") for n in metrics]
        if wanted is not None and wanted.removeprefix("eval_") not in known:
            names = ", ".join(known)
            raise UserError(f"metric_for_best_model={wanted!r} is not measured; use one of {names}")

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        self.check_metric(metrics)
        return super()._determine_best_metric(metrics, trial)

    # ---- Batches and evaluation -----------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        data = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(data, Features) and self.args.train_sampling_strategy == "group_by_length":
            # Trainer reads lengths off a `Dataset` alone.
            sampler = LengthGroupedSampler(1, lengths=[row["length"] for row in data])
        else:
            sampler = super()._get_train_sampler(data)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.batch_size = self._train_batch_size * self.args.gradient_accumulation_steps
            seeds = self.args.data_seed, self.args.seed
            return EpochSampler(sampler, next(seed for seed in seeds if seed is not None))
        return sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        """In order, also where training groups by length: predictions belong to rows."""
        return SequentialSampler(eval_dataset) if has_length(eval_dataset) else None

    def _prepare_inputs(self, inputs: Any) -> Batch:
        """As in Trainer, as a `Batch`, whatever the collator made."""
        return Batch(super()._prepare_inputs(inputs))

    @torch.no_grad()
    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The objective's mean loss, predictions and references of a batch."""
        batch = self._prepare_inputs(inputs)
        losses, predictions, references = self.eval_objective.predict(model, batch)
        mean = losses.mean()
        return (mean, None, None) if prediction_loss_only else (mean, predictions, references)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir
        if isinstance(self.model, PeftModel):
            adapters.save_adapter(self.model, folder)
            if self.engine is not None:
                self.engine.save_adapter(served.states_of(self.model.get_base_model()), folder)
        else:
            self.model.save_pretrained(folder)
        self.processing_class.save_pretrained(folder)
        write_model_card(folder, self.model, self.args.tune, self.facts)

    @property
    def facts(self) -> dict[str, Any]:
        """The contents of `zo_metrics.json`: `summary`, or before there is one, what is known."""
        logs = {name: value for log in self.state.log_history for name, value in log.items()}
        return self.summary or results(
            self, {}, logs, evaluated=self.eval_dataset, wall_seconds=logs.get("train_runtime")
        )

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository `hub_model_id`, unless there is one, or raise a UserError."""
        if not self.is_world_process_zero():
            return
        args = self.args
        name = args.hub_model_id or Path(args.output_dir).resolve().name
        private = args.hub_private_repo if private is None else private
        self.hub_model_id = create_repository(name, private, token or args.hub_token)
        self.push_in_progress: PushInProgress | None = None

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> Any:
        """As in Trainer, but only those files go up that `zo_peft.train.upload` allows.

        It returns the commit; without `blocking`, its future; None on other ranks than the first. A
        UserError says that the Hub refuses, or that a file holds a token.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        if not self.is_world_process_zero():
            return None
        # An upload that is under way still reads the folder.
        self._finish_current_push()
        self._save()
        folder = Path(self.args.output_dir)
        write_json(folder / METRICS_NAME, self.facts)
        revision, token = revision or self.args.hub_revision, token or self.args.hub_token
        given = (folder, self.hub_model_id, commit_message, revision, token)
        return upload(*given) if blocking else HfApi().run_as_future(upload, *given)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        under_way = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if self.args.hub_always_push or not under_way:
            message = f"Training in progress, step {self.state.global_step}"
            self.push_in_progress = PushInProgress([self.push_to_hub(message, blocking=False)])

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card of `zo_peft.train.card`, which every save writes as well."""
        if self.args.should_save:
            write_model_card(self.args.output_dir, self.model, self.args.tune, self.facts)


def _tokenization(model: AnyModel, tokenizer: Any, args: ZOConfig, generates: bool) -> Tokenization:
    num_labels = model.config.num_labels if adapters.classifies(model) else None
    if generates and num_labels is not None:
        raise UserError("rewards are for language models; this model has a head for classes")
    context, vocabulary = adapters.context_length(model, tokenizer), adapters.vocabulary(model)
    most, drawn = args.max_length, args.max_completion_length
    return Tokenization(tokenizer, context, most, num_labels, generates, drawn, vocabulary)


def _check_batches(collate: Callable[..., Batch], train: Any) -> None:
    theirs, needed = (make([next(iter(train))]) for make in (collate, Collator(0)))
    if lacking := sorted(needed.keys() - theirs.keys() - {"attention_mask"}):
        raise UserError(f"batches of data_collator lack {', '.join(lacking)}; leave it out")
