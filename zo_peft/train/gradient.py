"""The baseline with gradients: the same model, data and objective, tuned by back-propagation."""

from pathlib import Path
from typing import Any

from peft import PeftModel, PeftType, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers.trainer_utils import TrainOutput
from transformers.training_args import OptimizerNames

from zo_peft.core.batch import Batch
from zo_peft.core.faults import Faults
from zo_peft.core.space import fill
from zo_peft.errors import UserError
from zo_peft.models.adapters import tuned_parameters
from zo_peft.models.hub import AnyModel
from zo_peft.models.quantized import Linear8bitLt
from zo_peft.objectives.rewards import RewardObjective
from zo_peft.objectives.scoring import AccuracyObjective, BlackBoxObjective
from zo_peft.train.base import BaseTrainer
from zo_peft.train.checkpoint import last_whole, load_tensors, save_tensors
from zo_peft.train.checks import GRADIENT_PASSES
from zo_peft.train.config import ZOConfig

#: By strategy: the optimizer, and learning rates of LoRA and its like, and of virtual tokens.
OPTIMIZERS = {
    "adam": (OptimizerNames.ADAMW_TORCH, 1e-3, 1e-2),
    "sgd": (OptimizerNames.SGD, 1e-1, 1.0),
}


#: In a checkpoint: what is trained. An adapter as PEFT saves it lacks the network of a prompt.
TRAINED_NAME = "zo_trained.safetensors"


class GradientTrainer(BaseTrainer):
    """Trains an adapter by back-propagation: `strategy` adam (AdamW) or sgd of a `ZOConfig`.

    It checkpoints activations where PEFT allows it, and prepares a quantized base as PEFT does.
    Its checkpoints are those of the stock Trainer, and hold what is trained. A UserError says that
    the objective has no gradient, or that the base itself would be tuned.

    A micro-batch counts as three forward passes, for a backward pass counts as two. `trained` is
    what is trained, by name.
    """

    trains = True
    #: What only steps with candidates have.
    faults, calibrations, guide = Faults(), (), None

    def prepare_base(self, model: AnyModel, args: ZOConfig) -> None:
        """Refuse what has no baseline, and let PEFT prepare a quantized base."""
        if args.strategy not in OPTIMIZERS:
            raise UserError(f"strategy={args.strategy!r} has no gradients; use a ZOTrainer")
        if args.tune != "adapter":
            raise UserError(f"strategy={args.strategy!r} tunes adapters only; drop tune")
        if args.world_size > 1:
            raise UserError(f"strategy={args.strategy!r} works in one process; start one")
        if getattr(model, "is_quantized", False) and not isinstance(model, PeftModel):
            prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)

    def ready(self) -> None:
        """Set up checkpointing, and the counts of what is spent."""
        if isinstance(self.objective, AccuracyObjective | BlackBoxObjective | RewardObjective):
            why = f"strategy={self.args.strategy!r} needs a gradient, and this objective has none"
            raise UserError(f"{why}; use a forward-only strategy")
        self.trained = tuned_parameters(self.model, self.args.tunable)
        self.model.requires_grad_(False)
        for parameter in self.trained.values():
            parameter.requires_grad_(True)
        self.tuned_numel = sum(parameter.numel() for parameter in self.trained.values())
        config = self.model.active_peft_config
        # The objective takes means, so the Trainer has to average over micro-batches.
        self.model_accepts_loss_kwargs = False
        self.args.optim, *rates = OPTIMIZERS[self.args.strategy]
        if self.args.learning_rate is None:
            self.args.learning_rate = rates[config.is_prompt_learning]
        # PEFT refuses gradient checkpointing for a prefix.
        if config.peft_type != PeftType.PREFIX_TUNING:
            # The int8 matmul keeps its input where checkpoints without reentrance cannot drop it;
            # with it, the inputs must require gradients.
            has_int8 = any(isinstance(module, Linear8bitLt) for module in self.model.modules())
            # Trainer reads one pair of these, which depends on its version.
            for name in ("activation_checkpointing", "gradient_checkpointing"):
                setattr(self.args, name, True)
                setattr(self.args, f"{name}_kwargs", {"use_reentrant": has_int8})
            if has_int8:
                self.model.get_base_model().enable_input_require_grads()

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """As in Trainer; with True a run begins where there is no checkpoint to go on from."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole(Path(self.args.output_dir))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        save_tensors(Path(output_dir) / TRAINED_NAME, self.trained)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *_: Any, **__: Any) -> None:
        fill(self.trained, load_tensors(Path(resume_from_checkpoint) / TRAINED_NAME))

    def compute_loss(self, model: nn.Module, inputs: Batch, *_: Any, **__: Any) -> Tensor:
        """The mean of the objective's losses over the micro-batch."""
        self.totals.forward_passes += GRADIENT_PASSES
        self.totals.examples_forwarded += GRADIENT_PASSES * len(inputs["labels"])
        loss = self.objective.losses(model, inputs).mean()
        self.totals.add(float(loss.detach()), 1 / self.current_gradient_accumulation_steps)
        return loss
