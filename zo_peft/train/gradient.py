"""The baseline with gradients: the same model, data and objective, tuned by back-propagation."""

from typing import Any

from bitsandbytes.nn import Linear8bitLt
from peft import PeftModel, PeftType, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers.training_args import OptimizerNames

from zo_peft.core.batch import Batch
from zo_peft.core.faults import Faults
from zo_peft.errors import UserError
from zo_peft.models.adapters import tuned_parameters
from zo_peft.models.hub import AnyModel
from zo_peft.objectives.rewards import RewardObjective
from zo_peft.objectives.scoring import AccuracyObjective, BlackBoxObjective
from zo_peft.train.base import BaseTrainer
from zo_peft.train.checks import GRADIENT_PASSES
from zo_peft.train.config import ZOConfig

#: By strategy: the optimizer, and learning rates of LoRA and its like, and of virtual tokens.
OPTIMIZERS = {
    "adam": (OptimizerNames.ADAMW_TORCH, 1e-3, 1e-2),
    "sgd": (OptimizerNames.SGD, 1e-1, 1.0),
}


class GradientTrainer(BaseTrainer):
    """Trains an adapter by back-propagation: `strategy` adam (AdamW) or sgd of a `ZOConfig`.

    It checkpoints activations where PEFT allows it, and prepares a quantized base as PEFT does.
    Its checkpoints are those of the stock Trainer. A UserError says that the objective has no
    gradient, or that the base itself would be tuned.

    Attributes:
        forward_passes: so far; a micro-batch counts as three (its backward pass as two).
        examples_forwarded: so far, counted in the same way.
    """

    trains = True

    def prepare_base(self, model: AnyModel, args: ZOConfig) -> None:
        """Refuse what has no baseline, and let PEFT prepare a quantized base."""
        if args.tune != "adapter":
            raise UserError(f"strategy={args.strategy!r} tunes adapters only; drop tune")
        if args.world_size > 1:
            raise UserError(f"strategy={args.strategy!r} works in one process; start one")
        if getattr(model, "is_quantized", False) and not isinstance(model, PeftModel):
            prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)

    def ready(self) -> None:
        """Set up checkpointing, and the counts of what is spent."""
        if isinstance(self.objective, AccuracyObjective | BlackBoxObjective | RewardObjective):
            raise UserError(
                f"strategy={self.args.strategy!r} needs a gradient, and this objective has none; "
                "use a forward-only strategy"
            )
        # The objective takes means, so the Trainer has to average over micro-batches.
        self.model_accepts_loss_kwargs = False
        self.forward_passes = self.examples_forwarded = 0
        tuned = tuned_parameters(self.model, self.args.tunable)
        self.model.requires_grad_(False)
        for parameter in tuned.values():
            parameter.requires_grad_(True)
        self.tuned_numel = sum(parameter.numel() for parameter in tuned.values())
        self.calibrations: list[Any] = []
        self.guide = None
        self.faults = Faults()
        config = self.model.active_peft_config
        self.args.optim, *rates = OPTIMIZERS[self.args.strategy]
        if self.args.learning_rate is None:
            self.args.learning_rate = rates[config.is_prompt_learning]
        # PEFT refuses gradient checkpointing for a prefix.
        if config.peft_type != PeftType.PREFIX_TUNING:
            # Trainer reads the new names alone; the old ones are only taken over on construction.
            self.args.activation_checkpointing = True
            # The int8 matmul keeps its input where checkpoints without reentrance cannot drop it;
            # with it, the inputs must require gradients.
            has_int8 = any(isinstance(module, Linear8bitLt) for module in self.model.modules())
            self.args.activation_checkpointing_kwargs = {"use_reentrant": has_int8}
            if has_int8:
                self.model.get_base_model().enable_input_require_grads()

    def compute_loss(self, model: nn.Module, inputs: Batch, *_: Any, **__: Any) -> Tensor:
        """The mean of the objective's losses over the micro-batch."""
        self.forward_passes += GRADIENT_PASSES
        self.examples_forwarded += GRADIENT_PASSES * len(inputs["labels"])
        return self.objective.losses(model, inputs).mean()
