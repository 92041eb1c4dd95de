"""vLLM's dialect of HTTP, against PyTorch, with a stand-in server and its faults."""

import itertools
import json
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from standin import Refusal, StandIn
from test_engines import LORA, POINTS, batches, in_engine
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from zo_peft.cli import main
from zo_peft.core.flat_space import FlatSpace
from zo_peft.data.collate import Collator
from zo_peft.engines import check
from zo_peft.engines.served import load_served
from zo_peft.engines.servers import NoServerLeftError
from zo_peft.engines.vllm import Vllm
from zo_peft.errors import UserError
from zo_peft.models.adapters import tuned_parameters
from zo_peft.models.recipe import evaluator_of
from zo_peft.objectives.rewards import RewardObjective


class Cluster:
    """A base in PyTorch, and servers that have it."""

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model, name
        self.servers: list[StandIn] = []

    def start(self, count: int = 1) -> list[str]:
        """The addresses of more servers."""
        new = [StandIn(self.model, self.name) for _ in range(count)]
        self.servers += new
        return [server.url for server in new]

    def restart(self, server: StandIn) -> None:
        self.servers.append(StandIn(self.model, self.name, server.server_port))

    def lora(self, urls: list[str], timeout: float = 20.0, **settings: Any) -> PeftModel:
        """A random LoRA on the served base."""
        given = {"urls": urls, "folder": None, "timeout": timeout} | settings
        return filled(get_peft_model(load_served(self.name, "vllm", **given)[0], LORA))


def filled(model: PeftModel) -> PeftModel:
    generator = torch.Generator().manual_seed(1)
    for parameter in tuned_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> tuple[Any, str]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    model = tiny.llama().eval()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny.MODEL).save_pretrained(folder)
    return model, str(folder)


@pytest.fixture
def cluster(base: tuple[Any, str]) -> Iterator[Cluster]:
    cluster = Cluster(*base)
    yield cluster
    for server in cluster.servers:
        server.stop()


@pytest.fixture(scope="module")
def expected(base: tuple[Any, str]) -> Callable[[str], torch.Tensor]:
    """The losses of PyTorch."""
    own = filled(get_peft_model(AutoModelForCausalLM.from_pretrained(base[1]), LORA))

    def losses(name: str) -> torch.Tensor:
        objective, batch = batches()[name]
        space = FlatSpace(tuned_parameters(own))
        return evaluator_of(own, space, objective, 1).batch_losses(points(name), batch)

    return losses


def points(name: str) -> Any:
    return POINTS if name == "options" else [point[:1] for point in POINTS]


def losses(served: PeftModel, name: str = "options") -> torch.Tensor:
    objective, batch = batches()[name]
    return in_engine(served, objective).batch_losses(points(name), batch)


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", batches())
def test_servers_have_the_losses_of_pytorch(cluster: Cluster, expected: Any, name: str) -> None:
    served = cluster.lora(cluster.start(2))
    assert_near(losses(served, name), expected(name))
    assert all("/v1/load_lora_adapter" in server.asked for server in cluster.servers)
    # Nothing of it stays at the servers.
    assert not any(server.adapters for server in cluster.servers)


def test_the_base_alone_answers_and_long_lists_of_tokens_are_split(cluster: Cluster) -> None:
    engine = cluster.lora(cluster.start()).get_base_model().engine
    tokens = torch.arange(50)[None]
    [row] = check.rows_of(batches()["options"][1])[:1]
    found = engine.answer({}, [[check.Row(row.ids, [3], tokens)]])
    known = cluster.model(torch.tensor([row.ids[:4]])).logits[0, -1].log_softmax(-1)
    assert_near(found.log_probabilities[0], known[:50])
    assert found.likeliest == known.argmax()
    assert engine.swaps == 0


def test_adapters_are_for_a_moment_in_the_folder_that_servers_share(
    cluster: Cluster, tmp_path: Path, monkeypatch: Any
) -> None:
    (tmp_path / "shared").mkdir()
    monkeypatch.chdir(tmp_path)
    served, paths = cluster.lora(cluster.start(), folder="shared"), []

    def note(path: str, body: dict[str, Any]) -> None:
        if path == "/v1/load_lora_adapter":
            paths.append(Path(body["lora_path"]))

    cluster.servers[0].before = note
    losses(served)
    assert len({*paths}) == len(paths) > 2
    assert {path.parents[1] for path in paths} == {tmp_path / "shared"}
    assert not [*(tmp_path / "shared").iterdir()]


def test_completions_are_pytorchs_and_candidates_share_what_is_drawn(cluster: Cluster) -> None:
    served = cluster.lora(cluster.start(2))
    own = filled(get_peft_model(AutoModelForCausalLM.from_pretrained(cluster.name), LORA))
    ids = [[5, 9, 3, 8, 21, 7, 7, 30], [11, 4, 6], [11, 4, 6]]
    rows = [{"prompt_ids": i, "columns": {"prompt": ""}} for i in ids]
    batch = Collator(tiny.PAD)(rows).repeated(2)
    tokenizer, seen = AutoTokenizer.from_pretrained(tiny.MODEL), list[Any]()

    def reward(completion_ids: Any, **_: Any) -> list[float]:
        seen.append(completion_ids)
        return [0.0] * len(completion_ids)

    for model in (served, own):
        model.generation_config.eos_token_id = [*range(1, 64, 4)]
        RewardObjective([reward], tokenizer, None, 7, temperature=0.0).losses(model, batch)
    assert seen[0] == seen[1]
    assert len({*map(len, seen[0])}) > 1
    for seed in (1, 2, 1):
        RewardObjective([reward], tokenizer, None, 7, 2.0, seed=seed).losses(served, batch)
    *_, first, second, again = seen
    assert first == again != second
    assert first[:3] == first[3:]
    assert first[1] != first[2]  # of the same prompt, in two examples


# ---- Faults -------------------------------------------------------------------------------------


def test_a_cache_that_outlives_its_adapter_is_found(cluster: Cluster, monkeypatch: Any) -> None:
    served = cluster.lora(cluster.start())
    batch = batches()["options"][1]
    check.check_answers(served, batch, cluster.name)

    def one_salt(engine: Any) -> None:
        engine._salts = itertools.repeat(secrets.token_hex(8))

    monkeypatch.setattr(Vllm, "forget", one_salt)
    with pytest.raises(UserError, match="another adapter was there before"):
        check.check_answers(served, batch)


def test_a_request_that_hangs_is_asked_again_elsewhere(cluster: Cluster, expected: Any) -> None:
    hold = threading.Event()
    served = cluster.lora(cluster.start(2), timeout=60)
    cluster.servers[0].before = lambda path, _: hold.wait(30) and None
    assert_near(losses(served), expected("options"))
    hold.set()


def test_a_hanging_server_that_is_the_only_one_is_given_up(cluster: Cluster, expected: Any) -> None:
    hold = threading.Event()
    served = cluster.lora(cluster.start(), timeout=0.5)
    cluster.servers[0].before = lambda path, _: hold.wait(30) and None
    with pytest.raises(NoServerLeftError, match="ReadTimeout"):
        losses(served)
    hold.set()


def test_a_server_that_lost_the_adapter_loads_it_again(cluster: Cluster, expected: Any) -> None:
    served = cluster.lora(cluster.start())
    server, lost = cluster.servers[0], []

    def lose(path: str, body: dict[str, Any]) -> None:
        if path == "/v1/completions" and len(lost) < 3:
            lost.append(server.adapters.pop(body["model"]))

    server.before = lose
    assert_near(losses(served), expected("options"))
    assert len(lost) == 3


def wrong_name(answer: dict[str, Any]) -> None:
    answer["model"] = "another"


def wrong_tokens(answer: dict[str, Any]) -> None:
    answer["choices"][0]["prompt_token_ids"] = [1]


def no_tokens(answer: dict[str, Any]) -> None:
    answer["choices"][0]["logprobs"]["top_logprobs"] = [{"token_id:1": 0.0}]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (wrong_name, "answers for another model, or other tokens"),
        (wrong_tokens, "answers for another model, or other tokens"),
        (no_tokens, "does not answer as vLLM 0.32 does: KeyError"),
    ],
)
def test_a_wrong_answer_is_refused(
    cluster: Cluster, expected: Any, wrong: Any, message: str
) -> None:
    served = cluster.lora(cluster.start(2))
    cluster.servers[0].after = wrong
    assert_near(losses(served), expected("options"))
    cluster.servers[1].after = wrong
    with pytest.raises(UserError, match=message):
        cluster.lora([cluster.servers[1].url])


def test_half_of_the_servers_go_and_then_all(cluster: Cluster, expected: Any) -> None:
    served = cluster.lora(cluster.start(4), timeout=4.0)
    gone = [cluster.servers.pop(0), cluster.servers.pop(0)]
    for server in gone:
        server.stop()
    assert_near(losses(served), expected("options"))
    # One comes back, and the others go.
    cluster.restart(gone[0])
    for _ in range(2):
        cluster.servers.pop(0).stop()
    assert_near(losses(served), expected("options"))
    cluster.servers.pop().stop()
    with pytest.raises(NoServerLeftError, match=r"none of 4 servers answers .*ConnectError"):
        losses(served)


def test_another_base_is_refused(cluster: Cluster) -> None:
    urls = cluster.start()
    torch.manual_seed(1)
    other = Cluster(tiny.llama(initializer_range=0.2).eval(), cluster.name)
    cluster.servers += [StandIn(other.model, cluster.name)]
    with pytest.raises(UserError, match="answers otherwise than"):
        cluster.lora([*urls, cluster.servers[-1].url])


# ---- Runs ---------------------------------------------------------------------------------------


@pytest.fixture
def embedded() -> Iterator[Cluster]:
    model = AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float32).eval()
    cluster = Cluster(model, tiny.MODEL)
    yield cluster
    for server in cluster.servers:
        server.stop()


class At(TrainerCallback):
    """Calls a function at the end of a step."""

    def __init__(self, events: dict[int, Callable[[], None]]) -> None:
        self.events = events

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.events.get(state.global_step, lambda: None)()


def run(folder: Path, **settings: Any) -> Any:
    defaults = {"max_steps": 8, "per_device_train_batch_size": 4, "zo_eps": 0.03}
    defaults |= {"per_example_noise": False, "save_strategy": "steps", "save_steps": 2}
    return tiny.make_trainer(folder, test=tiny.examples("test", 16), **{**defaults, **settings})


def test_a_run_with_faults_ends_where_one_in_pytorch_does(
    embedded: Cluster, tmp_path: Path
) -> None:
    own = run(tmp_path / "own")
    own.train()
    urls = embedded.start(2)
    first, second = embedded.servers
    events = {1: first.stop, 3: lambda: embedded.restart(first), 4: second.stop}
    embedded.servers.clear()

    def all_go() -> None:
        embedded.servers.pop().stop()

    settings = {"engine": "vllm", "engine_url": urls, "engine_timeout": 5.0}
    trainer = run(tmp_path / "out", **settings, callbacks=[At(events | {5: all_go})])
    before = tiny.theta(trainer)
    with pytest.raises(NoServerLeftError, match="start them again, and resume the run"):
        trainer.train()
    assert trainer.state.global_step == 5
    settings["engine_url"] = embedded.start()
    resumed = run(tmp_path / "out", **settings)
    resumed.train(resume_from_checkpoint=True)
    for name, tensor in tiny.theta(own).items():
        torch.testing.assert_close(tiny.theta(resumed)[name], tensor, atol=1e-3, rtol=0)
        assert not torch.equal(before[name], tensor)
    assert resumed.evaluate()["eval_loss"] == pytest.approx(own.evaluate()["eval_loss"], abs=1e-3)


def test_the_command_line_knows_servers(embedded: Cluster, tmp_path: Path, capsys: Any) -> None:
    url, test = embedded.start(), tmp_path / "test.jsonl"
    lines = (tiny.EMBEDDED / "test.jsonl").read_text().splitlines()[:8]
    test.write_text("\n".join(lines))
    changes = {"engine": "vllm", "engine_url": url, "eval_file": test, "per_example_noise": False}
    options = tiny.command_line(tmp_path / "out", **changes, max_steps=1)
    assert main(["train", *options, "--json"]) == 0
    trained = json.loads(capsys.readouterr().out)
    assert trained["engine"]["loaded"] == "vllm"
    assert "127.0.0.1" not in (tmp_path / "out" / "zo_metrics.json").read_text()
    out = [str(tmp_path / "out"), str(test)]
    assert main(["evaluate", *out, "--engine_url", *url, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["eval_loss"] == pytest.approx(trained["eval_loss_after"], abs=1e-4)
    answers = tmp_path / "answers.jsonl"
    assert main(["predict", *out, "--engine_url", *url, "--output_file", str(answers)]) == 0
    assert len(answers.read_text().splitlines()) == 8
    assert main(["evaluate", *out]) == 2
    assert "with the addresses of its servers" in capsys.readouterr().err


REFUSED = [
    ({"engine_url": ["http://127.0.0.1:9"]}, r"127.0.0.1:9 does not answer \(ConnectError"),
    ({"engine_url": ["localhost"]}, r"localhost does not answer \(UnsupportedProtocol"),
    ({"engine_url": None}, "with the addresses of its servers"),
    ({"engine": None}, "with the addresses of its servers"),
    ({"engine_folder": "/no/such/folder"}, "is no folder"),
    ({"engine": None, "engine_url": None, "engine_folder": "."}, "for engine='vllm' alone"),
    ({"engine_timeout": 0}, "it must be positive"),
    (
        {"model_name_or_path": "other", "tokenizer_name": tiny.MODEL},
        "The model other does not exist",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_work_is_refused(
    embedded: Cluster, tmp_path: Path, changes: dict[str, Any], message: str, capsys: Any
) -> None:
    given = {"engine": "vllm", "engine_url": embedded.start(), **changes}
    assert main(["train", *tiny.command_line(tmp_path / "out", **given, max_steps=1)]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (404, "does not load an adapter .*--enable-lora"),
        (400, "refuses a request: HTTP 400"),
        (500, "none of 1 servers answers .*HTTP 500"),
    ],
)
def test_a_server_that_loads_no_adapter_says_why(cluster: Cluster, code: int, message: str) -> None:
    served = cluster.lora(cluster.start())

    def refuse(body: dict[str, Any]) -> str:
        raise Refusal(code, "not here")

    cluster.servers[0].load = refuse
    with pytest.raises(UserError, match=message):
        losses(served)
