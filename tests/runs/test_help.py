"""The short help, against the options themselves; guesses at what a word meant."""

import re
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

import pytest
from transformers import TrainingArguments

from zo_peft.cli import COMMANDS, RUN, named
from zo_peft.runs.arguments import ModelArguments
from zo_peft.runs.help import ALIASES, SETS, guess, screen
from zo_peft.train.checks import REFUSED

OPTIONS = {f.name: f for argument in RUN for f in fields(named(argument))}


def shown(arguments: Sequence[str] = RUN, groups: Sequence[str] = ()) -> dict[str, str]:
    """Options and their meanings, each on one line."""
    text = re.sub(r"\n {5,}", " ", screen(arguments, groups))
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.startswith("  --")]
    return {name[2:]: meaning for name, meaning in lines}


@pytest.mark.parametrize("command", COMMANDS)
def test_all_options_of_ours_have_the_first_sentence_and_the_default_of_their_help(
    command: str,
) -> None:
    arguments = COMMANDS[command].arguments
    options = {f.name: f for argument in arguments for f in fields(named(argument))}
    found, upstream = shown(arguments), {f.name for f in fields(TrainingArguments)}
    assert options.keys() - upstream <= found.keys() <= options.keys()
    for name, meaning in found.items():
        field = options[name]
        sentence, default = re.split(r" \[(?=[^\[]*\]$)|$", meaning, maxsplit=1)
        assert field.metadata["help"].startswith(sentence.removesuffix(" (required)"))
        required = field.default is field.default_factory is MISSING
        assert meaning.endswith("(required)") == required
        unset = any(field.default is value for value in (None, False, MISSING))
        # The demo's budget is a constant that has a name.
        named_one = (command, name) == ("demo", "max_forward_passes")
        assert default == ("" if unset or named_one else f"{field.default}]")


def test_the_groups_show_options_that_are_taken_and_say_their_defaults() -> None:
    found = shown(RUN, COMMANDS["train"].groups)
    assert found.keys() <= OPTIONS.keys() - REFUSED.keys()
    assert {"model_name_or_path", "train_file", "max_forward_passes", "output_dir"} <= found.keys()
    given = {name: meaning.partition(" [")[2].rstrip("]") for name, meaning in found.items()}
    told = {
        name: str(getattr(OPTIONS[name].default, "value", OPTIONS[name].default)) for name in found
    }
    assert {n: d for n, d in given.items() if d and d != told[n]} == {"output_dir": "MODEL-DATA"}


@pytest.mark.parametrize(
    ("word", "meant"),
    {
        "--batch_size": "--per_device_train_batch_size",
        "--batch-size=4": "--per_device_train_batch_size",
        "--epochs": "--num_train_epochs",
        "--torch_dtype": "--dtype",
        "--lr": "--learning_rate",
        "--model": "--model_name_or_path",
        "--LoRA_R": "--lora_r",
        "--traim_file": "--train_file",
        "max_forward_pass": "max_forward_passes",
        "--qqq": None,
    }.items(),
)
def test_guesses(word: str, meant: str | None) -> None:
    assert guess(word, OPTIONS) == (f" (did you mean {meant}?)" if meant else "")


def test_sets_hold_options_and_have_other_names() -> None:
    assert not SETS.keys() & OPTIONS.keys()
    assert {name for options in SETS.values() for name in options} <= OPTIONS.keys()


def test_aliases_are_no_options_and_lead_to_some() -> None:
    assert not ALIASES.keys() & (OPTIONS.keys() - REFUSED.keys())
    assert set(ALIASES.values()) <= OPTIONS.keys() - REFUSED.keys()


@pytest.mark.parametrize(
    ("given", "modules"),
    [
        (["all-linear"], "all-linear"),
        ([r".*layers\.[01]\..*_proj"], r".*layers\.[01]\..*_proj"),
        (["q_proj"], ["q_proj"]),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (["q_proj,v_proj"], ["q_proj", "v_proj"]),
        (["self_attn.q_proj, v_proj"], ["self_attn.q_proj", "v_proj"]),
    ],
)
def test_target_modules_are_names_all_linear_or_an_expression(
    given: list[str], modules: Any
) -> None:
    config = ModelArguments("m", peft_type="lora", lora_target_modules=given).peft_config()
    assert config.target_modules == (modules if isinstance(modules, str) else set(modules))
