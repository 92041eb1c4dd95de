"""ZOConfig: what is refused, what presets fix, and how budgets become steps."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from zo_peft import UserError, ZOConfig
from zo_peft.core import eps as calibrate
from zo_peft.core.strategies import STRATEGIES
from zo_peft.train.checks import PRESETS, default_budget
from zo_peft.train.config import HELP

WARNING = "num_candidates=2"


@pytest.fixture(autouse=True)
def nothing_is_written(tmp_path: Path) -> Iterator[None]:
    yield
    assert list(tmp_path.iterdir()) == []


def make(tmp_path: Path, **settings: Any) -> ZOConfig:
    return ZOConfig(str(tmp_path / "run"), use_cpu=True, **settings)


def test_defaults(tmp_path: Path) -> None:
    config = make(tmp_path)
    assert (config.strategy, config.num_candidates, config.weighting) == ("guided", 4, "loss")
    assert (config.probe, config.noise, config.carry_best) == ("reuse", "rademacher", False)
    assert (config.update_rule, config.momentum, config.per_example_noise) == (
        "guided",
        0.9,
        True,
    )
    assert (config.preset, config.zo_eps, config.learning_rate) == (None, None, None)
    assert (config.max_forward_passes, config.max_length, config.tunable) == (None, None, None)


@pytest.mark.parametrize(
    ("settings", "noise", "update_rule"),
    [
        ({}, (0, None), "guided"),
        ({"strategy": "gv"}, (0, None), "normalized"),
        ({"tune": "scales"}, (0, None), "normalized"),
        ({"tune": "weights"}, (1, "eggroll"), "fzoo"),
        ({"tune": "weights", "noise_rank": 0}, (0, None), "fzoo"),
        ({"noise_rank": 3}, (3, "eggroll"), "normalized"),
        ({"tune": "weights", "preset": "mezo"}, (0, None), "sgd"),
        ({"tune": "weights", "preset": "subzero"}, (24, "subzero"), "sgd"),
        ({"preset": "lozo", "noise_rank": 4}, (4, "lozo"), "sgd"),
        ({"preset": "paper-gv", "low_rank_noise": "subzero"}, (24, "subzero"), "sgd"),
    ],
    ids=str,
)
def test_noise_and_update_rule_follow_what_is_tuned(
    settings: dict[str, Any], noise: tuple[Any, ...], update_rule: str, tmp_path: Path
) -> None:
    config = make(tmp_path, **settings)
    assert (config.noise_rank, config.low_rank_noise) == noise
    assert config.update_rule == update_rule


@pytest.mark.parametrize(
    "settings",
    [
        {"tune": "scales"},
        {"objective": "accuracy"},
        {"num_candidates": 8},
        {"weighting": "split"},
        {"noise_rank": 1},
        {"per_example_noise": False},
        {"update_rule": "fzoo"},
        {"max_forward_passes": 10, "zo_eps": 1e-2},
        {"max_forward_passes": 20, "gradient_accumulation_steps": 2, "zo_eps": 1e-2},
    ],
    ids=str,
)
def test_candidates_are_the_default_where_a_guide_is_not_meant(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    assert make(tmp_path, **settings).strategy == "gv"


def test_a_budget_becomes_one_of_candidates(tmp_path: Path) -> None:
    """What was given counts: steps as in a run for which gv was chosen, and they are no more."""
    for settings in ({"max_forward_passes": 200}, {"max_forward_passes": 200, "max_steps": 7}):
        config, asked = make(tmp_path, **settings), make(tmp_path, strategy="gv", **settings)
        assert config.strategy == "guided"
        changed = config.with_candidates()
        assert (changed.strategy, changed.update_rule) == ("gv", "normalized")
        assert changed.max_steps == asked.max_steps < 200
        assert config.strategy == "guided"


def test_a_run_with_gradients_says_what_of_candidates_it_does_not_use(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="zo_eps=0.1 is not used: strategy='adam'"):
        make(tmp_path, strategy="adam", zo_eps=0.1, max_grad_norm=0.5)


@pytest.mark.parametrize(
    ("settings", "steps", "passes", "budget"),
    [
        ({"strategy": "guided"}, 50, 1, 150),
        ({"strategy": "guided"}, 62.5, 1, 188),
        ({"strategy": "guided"}, 3, 1, 100),
        ({"strategy": "guided"}, 134, 1, 400),
        ({"strategy": "guided", "gradient_accumulation_steps": 2}, 3, 2, 200),
        ({"strategy": "guided", "gradient_accumulation_steps": 2}, 50, 2, 300),
        ({"strategy": "gv"}, 100, 4, 1_200),
        ({"strategy": "gv"}, 3, 4, 1_000),
        ({"strategy": "mezo"}, 1_000, 2, 4_000),
    ],
    ids=str,
)
def test_a_chosen_budget_is_three_times_over_the_data_within_bounds(
    settings: dict[str, Any], steps: float, passes: int, budget: int, tmp_path: Path
) -> None:
    config = make(tmp_path, **settings)
    assert config.chooses_budget
    assert default_budget(config, steps, passes) == budget
    limited = config.changed(max_forward_passes=budget)
    assert limited.max_steps == make(tmp_path, max_forward_passes=budget, **settings).max_steps
    assert config.max_forward_passes is None


@pytest.mark.parametrize(
    "settings", [{"max_steps": 5}, {"num_train_epochs": 3}, {"max_forward_passes": 200}], ids=str
)
def test_no_budget_is_chosen_beside_one_that_is_given(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    config = make(tmp_path, **settings)
    assert not config.chooses_budget
    assert config.num_train_epochs == 3
    assert config.max_steps == settings.get("max_steps", config.max_steps)


def test_names_are_taken_in_either_case(tmp_path: Path) -> None:
    config = make(tmp_path, strategy="GV", update_rule="Adam", noise="Gaussian")
    assert (config.strategy, config.update_rule, config.noise) == ("gv", "adam", "gaussian")


def test_every_field_of_its_own_is_documented() -> None:
    inherited = {field.name for field in fields(TrainingArguments)}
    own = [field for field in fields(ZOConfig) if field.name not in inherited]
    assert {"strategy", "zo_eps", "num_candidates", "max_forward_passes"} <= {f.name for f in own}
    assert all(field.metadata["help"].endswith(".") for field in own)
    assert {*HELP} == ZOConfig.__annotations__.keys() - {"_VALID_DICT_FIELDS"}


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"fp16": True}, ["fp16", "dtype='float16'"]),
        ({"bf16": True}, ["bf16", "dtype='bfloat16'"]),
        ({"fp16_full_eval": True}, ["fp16_full_eval", "dtype='float16'"]),
        ({"bf16_full_eval": True}, ["bf16_full_eval", "dtype='bfloat16'"]),
        ({"gradient_checkpointing": True}, ["gradient_checkpointing", "backward"]),
        ({"activation_checkpointing": True}, ["activation_checkpointing", "backward"]),
        ({"neftune_noise_alpha": 5.0}, ["neftune_noise_alpha", "eval mode"]),
        ({"label_smoothing_factor": 0.1}, ["label_smoothing_factor", "cross entropies"]),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, ["deepspeed", "no gradients"]),
        ({"fsdp": "full_shard"}, ["fsdp", "device_map"]),
        ({"auto_find_batch_size": True}, ["per_device_train_batch_size"]),
        ({"optim": "adafactor"}, ["optim", "update_rule"]),
        ({"strategy": "spsa"}, ["strategy='spsa'", "mezo, n-spsa, greedy, gv, guided, adam, sgd"]),
        ({"preset": "paper"}, ["preset='paper'", "paper-gv, paper-greedy, paper-mezo, mezo"]),
        ({"weighting": "rank"}, ["weighting='rank'", "split, loss"]),
        ({"probe": "none"}, ["probe='none'", "central, reuse"]),
        ({"log_level_replica": "great"}, ["log_level_replica='great'", "detail, debug, info"]),
        ({"log_level_replica": [4]}, ["log_level_replica=[4]", "detail, debug, info"]),
        ({"noise": "uniform"}, ["noise='uniform'", "gaussian, rademacher"]),
        *(
            ({name: value}, [name, "positive"])
            for name in ("zo_eps", "learning_rate", "max_forward_passes", "max_length")
            for value in (0, -1)
        ),
        ({"learning_rate": math.nan}, ["learning_rate=nan", "positive"]),
        *(
            ({name: value}, [f"{name}={value!r} is of another type", kind])
            for name, value, kind in [
                ("max_steps", "3", "int"),
                ("max_steps", 3.0, "int"),
                ("max_steps", None, "int"),
                ("seed", True, "int"),
                ("momentum", "0.9", "float"),
                ("momentum", False, "float"),
                ("carry_best", "no", "bool"),
                ("tunable", 1, "str | None"),
                ("reward_weights", [1, True], "list[float] | None"),
                ("accelerator_config", 2, "dict | str"),
            ]
        ),
        *(
            ({name: value}, [f"{name}={value}", "0 or more, and below 4294967296"])
            for name, value in [
                ("warmup_steps", math.nan),
                ("warmup_steps", math.inf),
                ("weight_decay", -0.1),
                ("save_steps", -5),
                ("data_seed", -1),
                ("num_candidates", 10**10),
            ]
        ),
        ({"adam_beta2": 1.0}, ["adam_beta2=1.0", "below 1"]),
        ({"max_grad_norm": 0.5}, ["max_grad_norm", "update_rule"]),
        ({"max_grad_norm": 0.5, "strategy": "adam", "bf16": True}, ["bf16"]),
        ({"adam_beta1": 0.8}, ["adam_beta1", "momentum"]),
        ({"use_liger_kernel": True}, ["use_liger_kernel", "backward"]),
        ({"prediction_loss_only": True}, ["prediction_loss_only", "metric"]),
        ({"num_train_epochs": 1, "max_forward_passes": 900}, ["num_train_epochs", "not both"]),
        ({"eval_do_concat_batches": False}, ["eval_do_concat_batches", "metric"]),
        ({"train_sampling_strategy": "length"}, ["train_sampling_strategy='length'", "random"]),
        ({"lr_scheduler_kwargs": "power"}, ["lr_scheduler_kwargs='power'", "JSON object"]),
        (
            {"dataloader_multiprocessing_context": "fork"},
            ["multiprocessing_context", "num_workers"],
        ),
        ({"dataloader_persistent_workers": True}, ["persistent_workers", "num_workers > 0"]),
        ({"zo_eps": math.inf}, ["zo_eps"]),
        ({"learning_rate": math.inf}, ["learning_rate"]),
        ({"num_candidates": 1}, ["num_candidates=1", "gv", "4 or more"]),
        ({"num_candidates": 0, "strategy": "greedy"}, ["num_candidates=0", "greedy"]),
        ({"num_candidates": 1, "strategy": "greedy"}, ["num_candidates=1", "greedy"]),
        ({"num_candidates": 0, "strategy": "n-spsa"}, ["num_candidates=0", "n-spsa"]),
        ({"num_candidates": -3, "strategy": "mezo"}, ["num_candidates=-3"]),
        ({"carry_best": True, "strategy": "mezo"}, ["carry_best", "mezo"]),
        ({"carry_best": True, "strategy": "n-spsa"}, ["carry_best", "n-spsa"]),
        ({"carry_best": True}, ["carry_best", "per_example_noise=False"]),
        ({"update_rule": "lion"}, ["update_rule='lion'", "sgd, momentum, normalized"]),
        *(({"momentum": value}, ["momentum", "below 1"]) for value in (-0.1, 1.0, math.nan)),
        (
            {"strategy": "gv", "max_forward_passes": 22},
            ["max_forward_passes=22", "choice of zo_eps", "give zo_eps"],
        ),
        ({"tune": "codes"}, ["tune='codes'", "adapter, scales, weights"]),
        ({"tune_unquantized": True}, ["tune_unquantized", "adapter"]),
        ({"noise_rank": -1}, ["noise_rank=-1", "0 or more"]),
        ({"noise_rank": 0, "low_rank_noise": "lozo"}, ["lozo", "noise_rank of 1"]),
        ({"low_rank_noise": "svd"}, ["low_rank_noise='svd'", "eggroll, lozo, subzero"]),
        ({"preset": "lozo", "low_rank_noise": "subzero"}, ["preset='lozo'", "low_rank_noise"]),
        ({"weighting": "split", "elite_fraction": 0.1}, ["elite_fraction=0.1", "4", "empty"]),
        ({"weighting": "split", "elite_fraction": 0.0}, ["elite_fraction"]),
        ({"weighting": "split", "elite_fraction": 1.0}, ["elite_fraction"]),
        ({"weighting": "split", "elite_fraction": 1.5}, ["elite_fraction"]),
        ({"weighting": "split", "elite_fraction": -0.5}, ["elite_fraction"]),
        ({"load_best_model_at_end": True, "save_only_model": True}, ["save_only_model"]),
        ({"load_best_model_at_end": True}, ["load_best_model_at_end", "eval_strategy"]),
        (
            {"max_forward_passes": 3, "zo_eps": 1e-2},
            ["max_forward_passes=3", "gv", "takes 4", "num_candidates"],
        ),
        (
            {"max_forward_passes": 7, "gradient_accumulation_steps": 2, "zo_eps": 1e-2},
            ["max_forward_passes=7", "takes 8"],
        ),
    ],
    ids=str,
)
def test_refuses_what_makes_no_sense(
    settings: dict[str, Any], parts: list[str], tmp_path: Path
) -> None:
    if not settings.keys() <= ZOConfig.__dataclass_fields__.keys():
        pytest.skip("this version of transformers has no such argument")
    with pytest.raises(UserError) as caught:
        make(tmp_path, **settings)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "settings",
    [
        {"fp16": False, "bf16": False, "deepspeed": None, "optim": "adamw_torch_fused"},
        {"label_smoothing_factor": 0.0, "neftune_noise_alpha": None},
        {"carry_best": True, "strategy": "greedy", "per_example_noise": False},
        {"weighting": "split", "elite_fraction": 0.25},
        {"weighting": "split", "elite_fraction": 0.99},
        {"strategy": "mezo", "num_candidates": 1},
        {"strategy": "n-spsa", "num_candidates": 1},
        {"max_forward_passes": 4, "zo_eps": 1e-2},
        {"max_forward_passes": 23},
        {"update_rule": "adam", "momentum": 0.0},
        {"weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 10},
    ],
    ids=str,
)
def test_takes_what_makes_sense(settings: dict[str, Any], tmp_path: Path) -> None:
    config = make(tmp_path, **settings)
    assert {name: getattr(config, name) for name in settings} == settings


#: The published algorithms (paper.md), and a value of each field that is another algorithm.
SHARED: dict[str, tuple[Any, Any]] = {
    "noise": ("gaussian", None),
    "per_example_noise": (False, None),
    "update_rule": ("sgd", "adam"),
    "lr_scheduler_type": ("constant", "cosine"),
    "train_sampling_strategy": ("random", "sequential"),
}
PUBLISHED: dict[str, dict[str, tuple[Any, Any]]] = {
    "paper-gv": {
        "strategy": ("gv", "greedy"),
        "elite_fraction": (0.5, 0.25),
        "weighting": ("split", None),
        "probe": ("central", None),
        "carry_best": (False, True),
        **SHARED,
    },
    "paper-greedy": {
        "strategy": ("greedy", "mezo"),
        "probe": ("central", None),
        "carry_best": (False, True),
        **SHARED,
    },
    "mezo": {
        "strategy": ("mezo", "n-spsa"),
        **SHARED,
    },
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_fixes_the_published_fields_and_no_others(preset: str, tmp_path: Path) -> None:
    fixed, plain, config = PUBLISHED[preset], make(tmp_path), make(tmp_path, preset=preset)
    free = {field.name for field in fields(ZOConfig)} - {"preset", "num_candidates"}
    for name in free:
        wanted = fixed[name][0] if name in fixed else getattr(plain, name)
        assert getattr(config, name) == wanted, name
    given = {name: published for name, (published, _) in fixed.items()}
    assert make(tmp_path, preset=preset, **given).probe == config.probe


@pytest.mark.parametrize(
    ("preset", "name"),
    [(p, name) for p, fixed in PUBLISHED.items() for name, (_, other) in fixed.items() if other],
)
def test_a_preset_refuses_another_value(preset: str, name: str, tmp_path: Path) -> None:
    published, other = PUBLISHED[preset][name]
    with pytest.raises(UserError, match=f"fixes {name}={published!r}, not {other!r}"):
        make(tmp_path, preset=preset, **{name: other})


def test_a_preset_leaves_the_settings_free(tmp_path: Path) -> None:
    settings = {"num_candidates": 16, "zo_eps": 1e-3, "learning_rate": 1e-6, "seed": 5}
    config = make(tmp_path, preset="paper-gv", **settings)
    assert {name: getattr(config, name) for name in settings} == settings
    assert config.forward_passes_per_step == 18
    assert make(tmp_path, preset="mezo").forward_passes_per_step == 2


@pytest.mark.parametrize("settings", [{}, {"strategy": "greedy"}, {"preset": "paper-gv"}], ids=str)
def test_two_candidates_warn_and_say_why(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=WARNING) as caught:
        make(tmp_path, num_candidates=2, **settings)
    (message,) = (str(w.message) for w in caught if WARNING in str(w.message))
    assert "no more than MeZO" in message
    assert "+-(z1 - z2)" in message
    assert "4 or more" in message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "mezo", "num_candidates": 2}, "num_candidates is not used with mezo"),
        ({"strategy": "n-spsa", "probe": "central"}, "probe is not used with n-spsa"),
        ({"strategy": "greedy", "weighting": "split"}, "weighting is not used with greedy"),
        ({"elite_fraction": 0.25}, "elite_fraction is not used with loss"),
        ({"update_rule": "sgd", "momentum": 0.5}, "momentum is not used with sgd"),
        ({"update_rule": "spectral", "adam_beta2": 0.5}, "adam_beta2 is not used with spectral"),
    ],
    ids=str,
)
def test_what_has_no_say_is_told(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=message):
        make(tmp_path, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "n-spsa", "num_candidates": 2},
        {"strategy": "greedy", "probe": "central"},
        {"weighting": "split", "elite_fraction": 0.25},
        {"update_rule": "adam", "momentum": 0.5, "adam_beta2": 0.5},
        {"strategy": "guided", "adam_beta2": 0.5},
        {"strategy": "adam", "adam_beta2": 0.5},
        *({"preset": name} for name in PRESETS),
    ],
    ids=str,
)
def test_of_what_has_a_say_nothing_is_told(settings: dict[str, Any], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* is not used with")
        make(tmp_path, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_candidates": 3},
        {"num_candidates": 4},
        {"num_candidates": 2, "strategy": "n-spsa"},
    ],
    ids=str,
)
def test_other_numbers_of_candidates_do_not_warn(settings: dict[str, Any], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*candidates.*")
        make(tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_forward_passes": 80}, 10),
        ({"max_forward_passes": 87}, 10),
        ({"max_forward_passes": 88}, 11),
        ({"max_forward_passes": 8}, 1),
        ({"max_forward_passes": 80, "max_steps": 3}, 3),
        ({"max_forward_passes": 80, "max_steps": 10}, 10),
        ({"max_forward_passes": 80, "max_steps": 1000}, 10),
        ({"max_forward_passes": 80, "gradient_accumulation_steps": 4}, 2),
        ({"max_forward_passes": 80, "strategy": "mezo"}, 40),
        ({"max_forward_passes": 80, "strategy": "n-spsa"}, 5),
        ({"max_forward_passes": 80, "strategy": "greedy"}, 8),
        ({"max_forward_passes": 80, "preset": "paper-greedy"}, 8),
        ({"max_forward_passes": 99, "preset": "paper-gv"}, 9),
        ({"max_steps": 7}, 7),
        ({}, -1),
    ],
    ids=str,
)
def test_the_smaller_budget_counts(settings: dict[str, Any], steps: int, tmp_path: Path) -> None:
    config = make(tmp_path, **{"zo_eps": 1e-2, "num_candidates": 8, **settings})
    assert config.max_steps == steps
    if "max_forward_passes" in settings:
        spent = steps * config.forward_passes_per_step
        assert spent <= settings["max_forward_passes"]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("budget", [200, 500, 20_000])
def test_the_choice_of_eps_is_counted_in_the_budget(
    budget: int, own: bool, accumulation: int, tmp_path: Path
) -> None:
    config = make(
        tmp_path,
        strategy="gv",
        max_forward_passes=budget * accumulation,
        per_example_noise=own,
        gradient_accumulation_steps=accumulation,
    )
    parts = config.per_device_train_batch_size if own else 1
    choices = calibrate.forward_passes(parts, config.max_steps) * accumulation
    steps = config.max_steps * config.forward_passes_per_step
    assert budget * accumulation - config.forward_passes_per_step < steps + choices
    assert steps + choices <= budget * accumulation
    if budget == 20_000:
        assert choices <= 0.03 * budget * accumulation


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 4),
        ({"per_device_train_batch_size": 2}, 8),
        ({"per_example_noise": False}, 8),
        ({"preset": "paper-gv"}, 8),
    ],
    ids=str,
)
def test_the_number_of_candidates_follows_from_the_batch(
    settings: dict[str, Any], count: int, tmp_path: Path
) -> None:
    assert make(tmp_path, **settings).num_candidates == count


def test_model_init_kwargs_may_be_json(tmp_path: Path) -> None:
    config = make(tmp_path, model_init_kwargs='{"dtype": "bfloat16"}')
    assert config.model_init_kwargs == {"dtype": "bfloat16"}


def test_a_strategy_that_joins_the_table_later_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="strategy='late' is not known"):
        make(tmp_path, strategy="late")
    monkeypatch.setitem(STRATEGIES, "late", STRATEGIES["mezo"])
    assert make(tmp_path, strategy="late").forward_passes_per_step == 2
