"""What of a configuration is refused, and what presets and defaults make of it."""

import math
import reprlib
import warnings
from dataclasses import fields
from os import PathLike
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from transformers.trainer_pt_utils import AcceleratorConfig

from zo_peft.core.guide import CHECK_PASSES, FIRST_PASSES
from zo_peft.core.low_rank import Structure
from zo_peft.core.strategies import STRATEGIES, Options
from zo_peft.core.updates import RULES
from zo_peft.errors import Notice, UserError

if TYPE_CHECKING:
    from zo_peft.train.config import ZOConfig

FOLDER = Path(__file__).parent

#: The strategies that back-propagate, as baselines (`zo_peft.GradientTrainer`).
GRADIENT = ("adam", "sgd")
#: The strategy that reads its directions off forward passes (`zo_peft.core.guide`).
GUIDED = "guided"
#: Forward passes that they count for a micro-batch: a backward pass takes about as long as two.
GRADIENT_PASSES = 3
#: The most forward passes of the first step of a guided run, for each micro-batch.
FIRST_GUIDED = 1 + FIRST_PASSES + CHECK_PASSES
#: Times over the data that a run makes which is given no other budget; and the least and the most
#: forward passes for it, guided and not, for each micro-batch of a step (docs/usage.md#how-long).
EPOCHS, GUIDED_BUDGET, BUDGET = 3.0, (100, 400), (1_000, 4_000)
#: Update rules that only candidates can use, and options that mean candidates.
ALONG_CANDIDATES = ("sgd", "fzoo")
OF_CANDIDATES = [f.name for f in fields(Options)]
OF_CANDIDATES += ["noise", "noise_rank", "low_rank_noise", "per_example_noise"]
#: What decides about steps without gradients, of which a run with gradients uses nothing.
CANDIDATES = {*OF_CANDIDATES, "update_rule", "momentum", "candidates_per_forward", "parallel"}
CANDIDATES |= {"zo_eps", "exact_layers", "tune_unquantized"}
#: Settings, and those strategies, weightings and update rules that do not use them.
UNUSED = {"num_candidates": ("mezo",), "probe": ("mezo", "n-spsa"), "momentum": ALONG_CANDIDATES}
UNUSED |= {"weighting": (w := ("greedy", "mezo", "n-spsa")), "elite_fraction": ("loss", *w)}
UNUSED["adam_beta2"] = (*ALONG_CANDIDATES, "momentum", "normalized", "spectral")
Preset = Literal["paper-gv", "paper-greedy", "paper-mezo", "mezo", "subzero", "lozo"]
Tune = Literal["adapter", "scales", "weights"]
ObjectiveName = Literal["accuracy", "f1", "exact_match"]

#: What each preset fixes.
PRESETS: dict[str, dict[str, Any]] = yaml.safe_load((FOLDER / "presets.yaml").read_bytes())

#: Rank of each kind of low-rank noise, unless given.
RANKS: dict[Structure, int] = {"eggroll": 1, "subzero": 24, "lozo": 2}

#: TrainingArguments that act through gradients, or cast the model, and why each is refused.
REFUSED: dict[str, str] = yaml.safe_load((FOLDER / "refused.yaml").read_bytes())

#: TrainingArguments that shape steps of strategies with gradients, and of no other.
OF_GRADIENTS = ["adam_beta1", "adam_epsilon", "max_grad_norm", "optim_args"]
OF_GRADIENTS += ["optim_target_modules", "torch_empty_cache_steps"]

#: Numbers that must not be 0, and those that must be below 1. None may be negative.
POSITIVE = ["zo_eps", "learning_rate", "max_forward_passes", "max_length", "candidates_per_forward"]
POSITIVE += ["max_completion_length", "gradient_accumulation_steps", "per_device_train_batch_size"]
POSITIVE += ["per_device_eval_batch_size", "max_steps", "top_p", "engine_timeout"]
BELOW_ONE = ["momentum", "adam_beta1", "adam_beta2"]

#: What an engine cannot do: the values of a setting, and what to do instead.
NOT_BY_ENGINES: dict[str, tuple[tuple[Any, ...], str]] = {
    "strategy": ((GUIDED, *GRADIENT), "an engine tells nothing of what is inside; use gv"),
    "tune": (("scales", "weights"), "an engine's base stays as it is; tune an adapter"),
    "torch_compile": ((True,), "the base is not PyTorch's; drop it"),
}


def check_fields(config: "ZOConfig") -> None:
    """Refuse what is not for this tuning, of another type than declared, or out of its range."""
    # These are looked up now, because a user's own may have joined the table since the import.
    known = {"strategy": (*STRATEGIES, GUIDED, *GRADIENT), "update_rule": tuple(RULES)}
    hints = get_type_hints(type(config))
    # transformers takes these as well, whatever it declares.
    hints["accelerator_config"] |= AcceleratorConfig
    hints["debug"] |= None
    descends = config.strategy in GRADIENT
    advice = "momentum, weight_decay and update_rule shape steps without gradients"
    refused = REFUSED | ({} if descends else dict.fromkeys(OF_GRADIENTS, advice))
    for field in fields(config):
        name, default = field.name, field.default
        value, hint = getattr(config, name), hints[name]
        given = f"{name}={reprlib.repr(value)}"
        if value is default is None:
            continue
        literals = (part for part in (hint, *get_args(hint)) if get_origin(part) is Literal)
        words = [*known.get(name, field.metadata.get("choices") or ())]
        words = words or [word for part in literals for word in get_args(part) if word]
        # Letters of either case will do.
        value = {word.lower(): word for word in words}.get(str(value).lower(), value)
        setattr(config, name, value)
        if words and value not in words:
            raise UserError(f"{given} is not known; use one of {', '.join(words)}")
        if not _is_of(value, hint):
            kind = hint.__name__ if isinstance(hint, type) else hint
            raise UserError(f"{given} is of another type; it must be {kind}")
        if value == default:
            continue
        # What is off by default is off with 0, too.
        if name in refused and (value or default is True):
            raise UserError(f"{name} is not for forward-only tuning: {refused[name]}")
        if name in CANDIDATES and descends:
            message = f"{given} is not used: strategy={config.strategy!r} has no candidates"
            warnings.warn(message, Notice, stacklevel=4)
        # Of a setting that is infinite or no number, nothing is known to be meant.
        limit, positive = 1 if name in BELOW_ONE else 1 << 32, name in POSITIVE
        if _is_of(value, float) and not (0 <= value < limit and (value or not positive)):
            least = "positive" if positive else "0 or more"
            raise UserError(f"{given}; it must be {least}, and below {limit}")


def _is_of(value: object, hint: Any) -> bool:
    """Whether a value is of a declared type; whole numbers are floats, and paths are strings."""
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(_is_of(value, part) for part in parts)
    if kind is Literal:
        return value in parts
    if kind is list and isinstance(value, list):
        return all(_is_of(one, parts[0]) for one in value)
    kinds = {float: int | float, str: str | PathLike}.get(kind, kind)
    return isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))


def apply_preset(config: "ZOConfig") -> None:
    """Set what the preset fixes, and refuse what contradicts it."""
    if config.preset is None:
        return
    for name, value in PRESETS[config.preset].items():
        given = getattr(config, name)
        if given not in (value, getattr(type(config), name)):
            raise UserError(f"preset={config.preset!r} fixes {name}={value!r}, not {given!r}")
        setattr(config, name, value)


def default_strategy(config: "ZOConfig") -> str:
    """What a strategy is where none is given and nothing is known of the model yet."""
    if config.exact_layers:
        return GUIDED
    if config.engine is not None:
        return "gv"
    given = any(getattr(config, name) != getattr(type(config), name) for name in OF_CANDIDATES)
    short = FIRST_GUIDED * config.gradient_accumulation_steps
    few = config.max_forward_passes is not None and config.max_forward_passes < short
    other = config.tune != "adapter" or config.objective == "accuracy"
    return "gv" if given or few or other or config.update_rule in ALONG_CANDIDATES else GUIDED


def default_budget(config: "ZOConfig", steps: float, passes: int) -> int:
    """The budget of a run that is given none; `steps` of so many `passes` go once over the data."""
    least, most = GUIDED_BUDGET if config.strategy == GUIDED else BUDGET
    micro_batches = config.gradient_accumulation_steps
    return min(max(math.ceil(EPOCHS * steps) * passes, micro_batches * least), micro_batches * most)


def check_first_guided(config: "ZOConfig", passes: int) -> None:
    """Refuse a budget below the first step of a guided run, of `passes` for each micro-batch."""
    budget, first = config.max_forward_passes, passes * config.gradient_accumulation_steps
    if budget is not None and budget < first:
        raise UserError(f"max_forward_passes={budget}; the first step of guided may take {first}")


def choose_noise(config: "ZOConfig") -> None:
    """Full noise, unless low-rank noise is asked for or weights are tuned in our own way."""
    if config.noise_rank is None:
        low = config.low_rank_noise or (config.tune == "weights" and config.preset is None)
        config.noise_rank = RANKS[config.low_rank_noise or "eggroll"] if low else 0
    if config.noise_rank == 0 and config.low_rank_noise is not None:
        raise UserError(f"low_rank_noise={config.low_rank_noise!r} needs a noise_rank of 1 or more")
    if config.noise_rank and config.low_rank_noise is None:
        config.low_rank_noise = "eggroll"


def check_values(config: "ZOConfig") -> None:
    """Refuse combinations that make no sense, and warn of what has no say."""
    chosen = config.strategy, config.weighting, str(config.update_rule)
    for name, without in UNUSED.items() if config.strategy not in GRADIENT else ():
        why = " and ".join(word for word in chosen if word in without)
        if why and getattr(config, name) != getattr(type(config), name):
            warnings.warn(f"{name} is not used with {why}", Notice, stacklevel=4)
    if config.max_steps < 0 and not config.num_train_epochs:
        raise UserError(f"num_train_epochs={config.num_train_epochs}; it must be positive")
    if config.top_p > 1:
        raise UserError(f"top_p={config.top_p}; it must be above 0 and at most 1")
    if config.load_best_model_at_end and config.save_only_model:
        raise UserError("load_best_model_at_end needs whole checkpoints; drop save_only_model")
    if config.load_best_model_at_end and config.eval_strategy == "no":
        raise UserError("load_best_model_at_end needs evaluations; give an eval_strategy")
    if config.exact_layers and config.strategy != GUIDED:
        raise UserError(f"exact_layers={config.exact_layers} is for strategy='guided' alone")
    if config.strategy == GUIDED and config.update_rule in ALONG_CANDIDATES:
        why = f"update_rule={config.update_rule!r} moves along candidates; with strategy='guided'"
        raise UserError(f"{why} use guided, adam, normalized, spectral or momentum")
    if config.tune_unquantized and config.tune == "adapter":
        raise UserError("tune_unquantized=True has no meaning for tune='adapter'")
    if config.engine is not None:
        for name, (values, advice) in NOT_BY_ENGINES.items():
            if (value := getattr(config, name)) in values:
                raise UserError(f"{name}={value!r} is not for engine={config.engine!r}: {advice}")
    for name in ("tokenizer_name", "engine_reference"):
        if getattr(config, name) is not None and config.engine is None:
            raise UserError(f"{name} has no meaning without an engine; drop it, or give an engine")
    if (config.engine == "vllm") != bool(config.engine_url):
        given = f"engine={config.engine!r} with engine_url={config.engine_url!r}"
        advice = "give engine='vllm' with the addresses of its servers, or neither"
        raise UserError(f"{given}; {advice}")
    for name in ("engine_folder", "engine_timeout"):
        if getattr(config, name) != getattr(type(config), name) and config.engine != "vllm":
            raise UserError(f"{name} is for engine='vllm' alone; drop it")


def check_candidates(config: "ZOConfig") -> None:
    """Refuse a number of candidates that leaves the strategy nothing to compare."""
    strategy, count = "gv" if config.strategy == GUIDED else config.strategy, config.num_candidates
    selects = strategy in STRATEGIES and STRATEGIES[strategy].selects
    assert count is not None
    if count < (2 if selects else 1):
        why = f"num_candidates={count} leaves {config.strategy} nothing to compare"
        raise UserError(f"{why}; use 4 or more")
    if config.carry_best and not selects:
        raise UserError(f"carry_best=True has no meaning for strategy={config.strategy!r}")
    if config.carry_best and config.per_example_noise:
        raise UserError("carry_best=True needs per_example_noise=False: one best candidate a step")
    split, share = strategy == "gv" and config.weighting == "split", config.elite_fraction
    if split and not 0 < int(share * count) < count:
        sides = "leaves one side of the split empty"
        raise UserError(f"elite_fraction={share} of {count} candidates {sides}")
    if selects and count == 2:
        why = "learns no more than MeZO, in more forward passes: its direction is +-(z1 - z2)"
        message = f"{config.strategy} with num_candidates=2 {why}; use 4 or more"
        warnings.warn(message, Notice, stacklevel=4)
