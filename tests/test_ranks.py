"""Several processes: the same run, and next to nothing on the wire."""

import contextlib
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import LAYERS, LORA, SIZES, WIDTH
from torch import distributed
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
)

from scripts.reward_tuning import make as make_rewarded
from zo_peft import Direction, UserError, ZOConfig, ZOTrainer
from zo_peft.core.flat_space import FlatSpace
from zo_peft.core.guide import Guided
from zo_peft.core.journal import JOURNAL_NAME, read
from zo_peft.core.ranks import Ranks
from zo_peft.data import Collator, make_examples, read_rows
from zo_peft.models.adapters import tuned_parameters
from zo_peft.models.guide import ResidualGuide
from zo_peft.models.recipe import evaluator_of
from zo_peft.objectives.rewards import RewardObjective
from zo_peft.objectives.scoring import CompletionObjective
from zo_peft.tools.demo import EMBEDDED, LABEL_WORDS, TEMPLATE

MODEL = str(EMBEDDED / "model")
CPU = torch.device("cpu")

#: Its processes have what this one has loaded.
FORK = multiprocessing.get_context("fork")


def on_ranks(count: int, function: Callable[..., Any], *args: Any, exit_code: int = 0) -> list[Any]:
    """What a function returns, or the UserError it raises, on each of so many processes.

    A process that is killed gives nothing. However slow the machine is, all are waited for: where
    one dies, those that wait for it in a collective operation get an error.

    Args:
        exit_code: that of every process; `-signal.SIGKILL` for one that is killed.
    """
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    processes, pipes = [], []
    for rank in range(count):
        receiving, sending = FORK.Pipe(duplex=False)
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
            # Without it accelerate gives each process its share of all cores, also of those that
            # other tests are using.
            "OMP_NUM_THREADS": "1",
        }
        process = FORK.Process(target=child, args=(environment, sending, function, args))
        process.start()
        sending.close()
        processes.append(process)
        pipes.append(receiving)
    results = []
    for receiving in pipes:
        # The pipe of a process that dies ends without a result.
        with contextlib.suppress(EOFError):
            results.append(receiving.recv())
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [exit_code] * count
    return results


def child(environment: dict[str, str], pipe: Any, function: Callable[..., Any], args: Any) -> None:
    os.environ.update(environment)
    try:
        pipe.send(function(*args))
    except UserError as error:
        pipe.send(error)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def examples(count: int) -> list[dict[str, Any]]:
    rows = read_rows(EMBEDDED / "train.jsonl")[:count]
    return make_examples(rows, "train", TEMPLATE, label_words=LABEL_WORDS.split(","))


def trainer(folder: Path, rows: int = 200, **settings: Any) -> ZOTrainer:
    args = ZOConfig(
        str(folder),
        **{
            "max_steps": 50,
            "per_device_train_batch_size": 16,
            "zo_eps": 1e-2,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "report_to": "none",
            "strategy": "gv",
            **settings,
        },
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    return ZOTrainer(MODEL, args, train_dataset=examples(rows), peft_config=lora)


def trained(folder: Path, resume: Any = None, **settings: Any) -> dict[str, Any]:
    """A run; several processes compare what they hold at its start and its end."""
    return result_of(trainer(folder, **settings), resume)


def result_of(run: ZOTrainer, resume: Any = None) -> dict[str, Any]:
    run.train(resume_from_checkpoint=resume)
    run.save_model()
    return {
        "adapter": {name: tensor.numpy().copy() for name, tensor in run.space.tensors().items()},
        "wire_bytes": run.ranks.wire_bytes if run.ranks else 0,
        "spent": (run.forward_passes, run.examples_forwarded, run.state.global_step),
    }


def losses(folder: Path) -> list[float]:
    return [record.loss for record in read(folder / JOURNAL_NAME)[1]]


def same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(first[name], second[name]) for name in first.keys() | second.keys())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("alone")
    return folder, trained(folder)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("parallel", ["data", "candidates"])
def test_the_number_of_processes_does_not_change_the_run(
    parallel: str, count: int, alone: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    batch = 16 // count if parallel == "data" else 16
    settings = {"parallel": parallel, "per_device_train_batch_size": batch}
    found = on_ranks(count, trained_with, tmp_path, settings)
    folder, expected = alone
    np.testing.assert_allclose(losses(tmp_path), losses(folder), atol=1e-5, rtol=0)
    assert len(losses(tmp_path)) == 50
    for result in found:
        assert result["spent"] == expected["spent"]
        assert same(result["adapter"], found[0]["adapter"])
        assert 0 < result["wire_bytes"] <= 100 * 4 * 50
    saved = load_file(tmp_path / "adapter_model.safetensors")
    names = {name: name.replace(".weight", ".default.weight") for name in saved}
    assert same({names[n]: t.numpy() for n, t in saved.items()}, found[0]["adapter"])


def assert_one_run(folder: Path, expected: dict[str, Any], found: list[dict[str, Any]]) -> None:
    """Processes in `folder / "both"` made the run of `folder / "alone"`, and end alike."""
    both, alone = (losses(folder / name) for name in ("both", "alone"))
    np.testing.assert_allclose(both, alone, atol=1e-4, rtol=0)
    for result in found:
        assert result["spent"] == expected["spent"]
        assert same(result["adapter"], found[0]["adapter"])


@pytest.mark.parametrize("parallel", ["data", "candidates"])
def test_all_processes_follow_the_same_guide(parallel: str, tmp_path: Path) -> None:
    settings = {"strategy": "guided", "max_steps": 6, "update_rule": "momentum"}
    settings |= {"learning_rate": 1e-3}
    expected = trained(tmp_path / "alone", **settings)
    batch = 8 if parallel == "data" else 16
    settings |= {"parallel": parallel, "per_device_train_batch_size": batch}
    found = on_ranks(2, trained_with, tmp_path / "both", settings)
    assert_one_run(tmp_path, expected, found)


@pytest.mark.parametrize("parallel", ["data", "candidates"])
def test_all_processes_follow_the_same_policy_gradient(parallel: str, tmp_path: Path) -> None:
    expected = rewarded(tmp_path / "alone", {})
    batch = 8 if parallel == "data" else 16
    settings = {"parallel": parallel, "per_device_train_batch_size": batch}
    found = on_ranks(2, rewarded, tmp_path / "both", settings)
    assert_one_run(tmp_path, expected, found)


def rewarded(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """A guided run whose rewards differ from completion to completion."""
    settings = {"max_steps": 3, "update_rule": "momentum", "learning_rate": 1e-4, **settings}
    return result_of(make_rewarded("LoRA", folder, vowels, strategy="guided", **settings))


def vowels(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(c in "aeiou" for c in text)) for text in completions]


def trained_with(folder: Path, settings: dict[str, Any], resume: Any = None) -> dict[str, Any]:
    return trained(folder, resume, **settings)


@pytest.mark.parametrize("parallel", ["data", "candidates"])
def test_goes_on_after_all_processes_were_killed(parallel: str, tmp_path: Path) -> None:
    settings = {
        "parallel": parallel,
        "max_steps": 12,
        "save_strategy": "steps",
        "save_steps": 5,
        "per_device_train_batch_size": 6,
        "rows": 40,
        "zo_eps": None,
    }
    whole = on_ranks(2, trained_with, tmp_path / "whole", settings)
    all_there = FORK.Barrier(2)
    killed = (tmp_path / "killed", settings, 8, all_there)
    assert on_ranks(2, killed_at, *killed, exit_code=-signal.SIGKILL) == []
    # The record of step 8 is written before its update, which was never made.
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")[:9]
    resumed = on_ranks(2, trained_with, tmp_path / "killed", settings, True)
    assert same(whole[0]["adapter"], resumed[0]["adapter"])
    assert same(resumed[0]["adapter"], resumed[1]["adapter"])
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


class BeforeUpdate(TrainerCallback):
    """Calls a function after a step's losses are known and before its update is made."""

    def __init__(self, step: int, function: Callable[[], None]) -> None:
        self.step, self.function = step, function

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.function()


def killed_at(folder: Path, settings: dict[str, Any], step: int, all_there: Any) -> None:
    def kill() -> None:
        # A process that dies while another still waits for its losses would give that one an error.
        all_there.wait()
        os.kill(os.getpid(), signal.SIGKILL)

    run = trainer(folder, **settings)
    run.add_callback(BeforeUpdate(step, kill))
    run.train()


def test_a_process_that_differs_is_named(tmp_path: Path) -> None:
    for error in on_ranks(3, disturbed, tmp_path):
        assert isinstance(error, UserError)
        assert "at step 3, what is tuned of rank 1 differs" in str(error)
    assert len(losses(tmp_path)) == 3


def disturbed(folder: Path) -> None:
    # The end of the run is where the processes are compared.
    run = trainer(folder, max_steps=3, per_device_train_batch_size=2)

    def disturb() -> None:
        if run.args.process_index == 1:
            next(iter(run.space.tensors().values())).view(-1)[3] += 1e-7

    run.add_callback(BeforeUpdate(2, disturb))
    run.train()


def test_processes_with_other_settings_do_not_start(tmp_path: Path) -> None:
    for error in on_ranks(2, started_with_rank_as_seed, tmp_path):
        assert "the base, the adapter or the settings of rank 0 and 1 differ" in str(error)
    assert not (tmp_path / JOURNAL_NAME).exists()


def started_with_rank_as_seed(folder: Path) -> None:
    trainer(folder, seed=int(os.environ["RANK"])).train()


def test_one_process_writes(tmp_path: Path) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "rows": 16}
    on_ranks(2, trained_in_a_folder_of_its_own, tmp_path, settings)
    assert (tmp_path / "0" / "checkpoint-4" / "zo_state.safetensors").exists()
    assert (tmp_path / "0" / "adapter_model.safetensors").exists()
    assert not [path for path in (tmp_path / "1").rglob("*") if path.is_file()]


def trained_in_a_folder_of_its_own(folder: Path, settings: dict[str, Any]) -> None:
    trained(folder / os.environ["RANK"], **settings)


def test_what_is_trained_beside_what_is_tuned_is_compared_too(tmp_path: Path) -> None:
    for error in on_ranks(2, started_with_other_values, tmp_path):
        assert "the base, the adapter or the settings of rank 0 and 1 differ" in str(error)


def started_with_other_values(folder: Path) -> None:
    run = trainer(folder, tunable="lora_B")
    first = next(p for n, p in run.model.named_parameters() if "lora_A" in n)
    first.data += float(os.environ["RANK"])
    run.train()


def test_an_objective_of_too_few_losses_is_named(tmp_path: Path) -> None:
    for error in on_ranks(2, evaluated_with_a_mean, tmp_path):
        assert "several processes need one for each" in str(error)


def evaluated_with_a_mean(folder: Path) -> None:
    run = trainer(folder, per_example_noise=False, candidates_per_forward=1)
    losses = run.objective.losses
    run.objective.losses = lambda *given: losses(*given).mean()[None]  # type: ignore[method-assign]
    run.train()


def test_gradients_stay_in_one_process(tmp_path: Path) -> None:
    for error in on_ranks(2, gradient, tmp_path):
        assert "works in one process" in str(error)


def gradient(folder: Path) -> None:
    from zo_peft.train.gradient import GradientTrainer

    args = ZOConfig(str(folder), strategy="adam", use_cpu=True, report_to="none")
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    GradientTrainer(MODEL, args, train_dataset=examples(4), peft_config=lora)


# ---- The evaluator: any numbers of points, examples and processes --------------------------------


@pytest.mark.parametrize("parallel", ["data", "candidates"])
def test_every_process_gets_all_losses(parallel: str) -> None:
    cases = [(1, 1, 1), (1, 5, 1), (2, 1, 1), (5, 7, 1), (5, 7, 7), (4, 2, 2), (3, 3, 1)]
    expected = [evaluated(case, None) for case in cases]
    for found in on_ranks(3, all_evaluated, cases, parallel):
        for (one, spread, parts), (other, own_spread, other_parts) in zip(expected, found):
            np.testing.assert_allclose(other, one, rtol=1e-5)
            np.testing.assert_allclose(own_spread, spread, rtol=1e-2, atol=1e-6)
            assert parts == other_parts


def all_evaluated(cases: list[tuple[int, int, int]], parallel: Any) -> list[Any]:
    distributed.init_process_group("gloo")
    return [evaluated(case, Ranks(parallel, CPU)) for case in cases]


def evaluated(case: tuple[int, int, int], ranks: Ranks | None) -> Any:
    """Losses, spreads and `parts` of so many points, examples and parts."""
    count, rows, parts = case
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(MODEL),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]),
    ).eval()
    space = FlatSpace(tuned_parameters(model))
    generator = torch.Generator().manual_seed(0)
    lengths = [6 + index % 3 for index in range(rows)]
    sequences = [torch.randint(5, 90, (n,), generator=generator).tolist() for n in lengths]
    features = [{"input_ids": ids, "labels": [-100] * 4 + ids[4:]} for ids in sequences]
    collate = Collator(0) if ranks is None else ranks.collator(Collator(0))
    batch = collate(features)
    evaluator = evaluator_of(model, space, CompletionObjective(), ranks=ranks)
    points = [
        [0.3 * Direction.of(100 * part + index) for index in range(count)] for part in range(parts)
    ]
    found = evaluator.evaluate(points, [batch])
    assert evaluator.forward_passes == count
    assert evaluator.examples_forwarded == count * rows
    return found.losses, (found.spread, found.example_spread), evaluator.parts([batch])


def test_gradients_are_those_of_the_whole_batch_whatever_ranks_have_padded() -> None:
    """With padding, layers with windows have a mask of their own, and are read by themselves."""
    expected = guided_gradients(None)
    for found in on_ranks(2, guided_gradients, "data"):
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            np.testing.assert_allclose(gradient, expected[name], rtol=1e-3, atol=1e-6)


def guided_gradients(parallel: Any) -> dict[str, np.ndarray]:
    """What a guide reads of four examples, of which the first two are of different length."""
    ranks = Ranks()
    if parallel is not None:
        distributed.init_process_group("gloo")
        ranks = Ranks(parallel, CPU)
    torch.manual_seed(0)
    windows = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    sizes = {**SIZES, "intermediate_size": WIDTH, "num_key_value_heads": 2}
    base = Qwen2ForCausalLM(Qwen2Config(**sizes, **windows, layer_types=kinds))
    model = get_peft_model(base, LORA).eval()
    space = FlatSpace(tuned_parameters(model))
    features = [
        {"input_ids": list(range(5, 5 + n)), "labels": [-100, *range(6, 5 + n)]}
        for n in (6, 9, 9, 9)
    ]
    batch = ranks.collator(Collator(0))(features)
    objective = CompletionObjective()
    evaluator = evaluator_of(model, space, objective, ranks=ranks)
    guided = Guided(ResidualGuide(model, space.parameters, objective), evaluator, 0)
    guided.due, guided.followed = 2, list(range(LAYERS))
    gradients = guided.estimate([batch], 1, 1)[0].gradients
    assert len(gradients) == 4 * LAYERS
    return {name: gradient.numpy() for name, gradient in gradients.items()}


def test_completions_are_drawn_with_the_noise_of_the_whole_batch() -> None:
    expected = drawn(None)
    assert len(set(map(tuple, expected))) > 1
    for parallel in ("data", "candidates"):
        for found in on_ranks(3, drawn, parallel):
            assert found == expected


def drawn(parallel: Any) -> list[list[float]]:
    """Rewards of sampled completions: the sums of their token ids."""
    ranks = None
    if parallel is not None:
        distributed.init_process_group("gloo")
        ranks = Ranks(parallel, CPU)
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(MODEL),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]),
    ).eval()

    def summed(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(sum(ids)) for ids in completion_ids]

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    objective = RewardObjective([summed], tokenizer, max_completion_length=4)
    features = [{"prompt_ids": [5, 6, 7], "columns": {"prompt": "a"}} for _ in range(5)]
    collate = Collator(0) if ranks is None else ranks.collator(Collator(0))
    evaluator = evaluator_of(model, FlatSpace(tuned_parameters(model)), objective, ranks=ranks)
    points = [[0.1 * Direction.of(part)] * 2 for part in range(5)]
    return evaluator.evaluate(points, [collate(features)]).losses
