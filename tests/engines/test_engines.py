"""Engines as evaluators, against PyTorch on the same base; those that are not there are skipped."""

import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from scripts.convert import write_gguf, write_openvino
from zo_peft.cli import main
from zo_peft.core.batch import Batch
from zo_peft.core.direction import Direction
from zo_peft.core.evaluator import Evaluator
from zo_peft.core.flat_space import FlatSpace
from zo_peft.data.collate import Collator
from zo_peft.engines import check, llamacpp
from zo_peft.engines.engine import installed
from zo_peft.engines.served import evaluator_of as served_evaluator_of
from zo_peft.engines.served import load_served
from zo_peft.errors import Notice, UserError
from zo_peft.models.adapters import tuned_parameters
from zo_peft.models.recipe import evaluator_of
from zo_peft.objectives.rewards import RewardObjective
from zo_peft.objectives.scoring import CompletionObjective, OptionObjective

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=ALL)
POINTS = [[0.1 * Direction.of(2 * m + g) for g in (0, 1)] for m in range(3)]


def qwen(config: Any, kind: Any) -> Any:
    sizes = {"intermediate_size": tiny.WIDTH, "num_key_value_heads": 2}
    return kind(config(**{**tiny.SIZES, **sizes, "head_dim": 16}))


NEEDED = {"llamacpp": ["xllamacpp", "gguf"], "openvino": ["openvino"]}
FLOAT = [("llamacpp", "llama"), ("llamacpp", "qwen2"), ("llamacpp", "qwen3"), ("openvino", "llama")]
FLOAT += [("openvino", "qwen2")]
QUANTIZED = [("llamacpp", "Q4_0"), ("openvino", "int4")]

MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny.llama,
    "qwen2": lambda: qwen(Qwen2Config, Qwen2ForCausalLM),
    "qwen3": lambda: qwen(Qwen3Config, Qwen3ForCausalLM),
}


def batches() -> dict[str, tuple[Any, Batch]]:
    """Options of several tokens, options of one, and completions; prompts of unlike length."""
    ids = [[5, 9, 3, 8, 21, 7, 7, 30], [11, 4, 6]]
    options = [[[7, 8], [9]], [[10], [12, 13]]]
    many = [{"prompt_ids": p, "option_ids": o, "label": 1} for p, o in zip(ids, options)]
    single = [{"prompt_ids": p, "option_ids": [[7], [9]], "label": 0} for p in ids]
    labels = [[-100] * (len(p) - 2) + p[-2:] for p in ids]
    completions = [{"input_ids": p, "labels": own} for p, own in zip(ids, labels)]
    given = [(OptionObjective(), many), (OptionObjective(), single)]
    given.append((CompletionObjective(), completions))
    names = ("long options", "options", "completions")
    return {name: (one, Collator(tiny.PAD)(rows)) for name, (one, rows) in zip(names, given)}


def converted(model: Any, folder: Path, engine: str, kind: str) -> str:
    """The name of a base in the engine's form; without the engine the test is skipped."""
    for package in NEEDED[engine] + (["nncf"] if kind == "int4" else []):
        pytest.importorskip(package)
    path = folder / f"{kind}.{engine}"
    {"llamacpp": write_gguf, "openvino": write_openvino}[engine](model, path, kind)
    return str(path)


def pair(folder: Path, engine: Any, name: str, kind: str) -> tuple[PeftModel, PeftModel]:
    """The same base with the same LoRA, in the engine and in PyTorch."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.save_pretrained(folder / name)
    AutoTokenizer.from_pretrained(tiny.MODEL).save_pretrained(folder / name)
    place = converted(model, folder, engine, kind)
    base, _ = load_served(place, engine, str(folder / name))
    served, own = get_peft_model(base, LORA), get_peft_model(model, LORA)
    for key, parameter in own.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
            served.get_parameter(key).data.copy_(parameter.data)
    return served.eval(), own.eval()


def in_engine(served: PeftModel, objective: Any) -> Evaluator:
    return served_evaluator_of(served, FlatSpace(tuned_parameters(served)), objective)


@pytest.fixture(scope="module", params=FLOAT, ids="-".join)
def both(request: Any, tmp_path_factory: Any) -> tuple[PeftModel, PeftModel]:
    engine, name = request.param
    kind = {"llamacpp": "F32", "openvino": "f32"}[engine]
    return pair(tmp_path_factory.mktemp("bases"), engine, name, kind)


@pytest.mark.parametrize("name", batches())
def test_a_float_engine_has_the_losses_of_pytorch(both: Any, name: str) -> None:
    objective, batch = batches()[name]
    served, own = both
    space = FlatSpace(tuned_parameters(own))
    points = POINTS if name == "options" else [point[:1] for point in POINTS]
    expected = evaluator_of(own, space, objective, 1).batch_losses(points, batch)
    losses = in_engine(served, objective).batch_losses(points, batch)
    assert expected.std() > 1e-2
    torch.testing.assert_close(losses, expected, atol=1e-4, rtol=0)
    for mine, theirs in zip(objective.predict(served, batch), objective.predict(own, batch)):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (2.0, 0.9)])
def test_a_float_engine_completes_prompts_as_pytorch_does(
    both: Any, temperature: float, top_p: float, monkeypatch: Any
) -> None:
    """Greedy and drawn, by candidates of each example or of all, with ends and prompts unlike."""
    served, own = both
    for model in both:
        monkeypatch.setattr(model.generation_config, "eos_token_id", [*range(1, 64, 6)])
    seen: dict[int, list[Any]] = {}

    def reward(completion_ids: Any, **_: Any) -> list[float]:
        seen.setdefault(turn, []).extend(completion_ids)
        return [float(sum(i * id_ for i, id_ in enumerate(ids, 1))) for ids in completion_ids]

    settings = {"max_completion_length": 9, "temperature": temperature, "top_p": top_p, "seed": 3}
    objective = RewardObjective([reward], AutoTokenizer.from_pretrained(tiny.MODEL), **settings)
    ids = [[5, 9, 3, 8, 21, 7, 7, 30], [11, 4, 6], [2, 40], [17, 13, 9, 50]]
    batch = Collator(tiny.PAD)([{"prompt_ids": i, "columns": {"prompt": ""}} for i in ids])
    plain = evaluator_of(own, FlatSpace(tuned_parameters(own)), objective)
    for points in ([point[:1] for point in POINTS], [point * 2 for point in POINTS]):
        losses = []
        for turn, evaluator in enumerate((in_engine(served, objective), plain)):  # noqa: B007
            losses.append(evaluator.batch_losses(points, batch))
        assert torch.equal(*losses)
    assert seen[0] == seen[1]
    assert len({*map(len, seen[0])}) > 2


@pytest.mark.parametrize(("kind", "within"), [("F16", 1e-3), ("Q4_K", 1e-2)])
def test_llamacpp_computes_with_the_rounded_numbers(
    kind: str, within: float, tmp_path: Any
) -> None:
    """Sequences share a space, k-quants stay as they are in the file, activations are rounded."""
    torch.manual_seed(0)
    model = tiny.llama(hidden_size=256, intermediate_size=256, num_key_value_heads=4).eval()
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny.MODEL).save_pretrained(tmp_path)
    served = get_peft_model(
        load_served(converted(model, tmp_path, "llamacpp", kind), "llamacpp", str(tmp_path))[0],
        LORA,
    )
    gguf = importlib.import_module("gguf")
    written = {
        tensor.name: torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        for tensor in gguf.GGUFReader(tmp_path / f"{kind}.llamacpp").tensors
    }
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        rows = written[names.get_name(name, (".weight",))]
        if re.search(r"[qk]_proj", name):
            rows = rows.view(4, -1, 2, 256).transpose(1, 2).reshape(256, 256)
        parameter.data.copy_(rows)
    own = get_peft_model(model, LORA).eval()
    for key, parameter in own.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
            served.get_parameter(key).data.copy_(parameter.data)
    ids = torch.randint(4, 60, (11, 40)).tolist()
    rows = [{"input_ids": i[: 20 + n], "labels": [-100, *i[1 : 20 + n]]} for n, i in enumerate(ids)]
    objective, batch = CompletionObjective(), Collator(tiny.PAD)(rows)
    expected = evaluator_of(own, FlatSpace(tuned_parameters(own)), objective, 1)
    points = [point[:1] for point in POINTS]
    evaluator = in_engine(served, objective)
    together = evaluator.batch_losses(points, batch)
    torch.testing.assert_close(together, expected.batch_losses(points, batch), atol=within, rtol=0)
    # A candidate's losses are the same with others and alone.
    alone = [evaluator.batch_losses([point], batch) for point in points]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


def test_the_check_knows_an_adapter_that_acts_otherwise(both: Any, monkeypatch: Any) -> None:
    served, own = both
    kind, batch = own.config.model_type, batches()["options"][1]
    reference = own.config.name_or_path or served.config.name_or_path
    check.check_answers(served, batch, reference)
    if not isinstance(served.engine, llamacpp.LlamaCpp):
        return
    other = None if llamacpp.ARCHITECTURES[kind] else r"\.[qk]_proj$"
    monkeypatch.setitem(llamacpp.ARCHITECTURES, kind, other)
    with pytest.raises(UserError, match="an adapter on k_proj acts otherwise"):
        check.check_answers(served, batch, reference)
    # On a quantized base nothing tells how near it must be.
    monkeypatch.setattr(served.engine, "is_float32", False)
    with pytest.warns(Notice, match="an adapter on k_proj acts otherwise"):
        check.check_answers(served, batch, reference)


# ---- Runs on the embedded model -----------------------------------------------------------------


@pytest.fixture(scope="module")
def bases(tmp_path_factory: Any) -> Callable[[str, str], str]:
    """Gives the embedded model in the form of an engine; each form is made once."""
    folder = tmp_path_factory.mktemp("embedded")
    plain = AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype="float32").eval()
    return cache(partial(converted, plain, folder))


def trainer_of(folder: Path, engine: str, model: str, **settings: Any) -> Any:
    settings = {"engine": engine, "tokenizer_name": tiny.MODEL, **settings}
    return tiny.make_trainer(folder, model=model, **settings)


@pytest.mark.parametrize(("engine", "kind"), QUANTIZED)
def test_a_quantized_engine_has_its_own_losses_one_by_one(
    engine: Any, kind: str, bases: Any
) -> None:
    torch.manual_seed(0)
    base, _ = load_served(bases(engine, kind), engine, tiny.MODEL)
    served = get_peft_model(base, LORA)
    objective, batch = batches()["options"]
    evaluator = in_engine(served, objective)
    together = evaluator.batch_losses(POINTS, batch)
    evaluator.candidates_per_forward = 1
    alone = [evaluator.batch_losses([[point]], batch)[0] for points in POINTS for point in points]
    # A point of a part belongs to the part's example alone.
    expected = torch.stack([torch.stack(alone[g::2])[:, g] for g in (0, 1)], dim=1)
    torch.testing.assert_close(together, expected, atol=1e-4, rtol=0)
    check.check_answers(served, batch)


def accuracy(model: PeftModel) -> float:
    rows = tiny.examples("test", 100)
    tokenizer = AutoTokenizer.from_pretrained(tiny.MODEL)
    words = [tokenizer(f"It was {word}").input_ids[-1] for word in rows[0]["options"]]
    right = 0
    for row in rows:
        logits = model(**tokenizer(row["prompt"], return_tensors="pt")).logits[0, -1, words]
        right += int(logits.argmax()) == row["label"]
    return right / len(rows)


@pytest.mark.parametrize(("engine", "kind"), QUANTIZED)
def test_a_run_on_a_quantized_base_learns_and_loads_anywhere(
    engine: str, kind: str, bases: Any, tmp_path: Path
) -> None:
    settings = {"max_steps": 30, "per_device_train_batch_size": 16, "zo_eps": 0.03}
    data = {"train": tiny.examples(count=400), "test": tiny.examples("test", 100)}
    trainer = trainer_of(tmp_path, engine, bases(engine, kind), **data, **settings)
    trainer.train()
    reached = trainer.evaluate()["eval_accuracy"]
    assert reached >= 0.9
    trainer.save_model()
    plain = AutoModelForCausalLM.from_pretrained(tiny.MODEL)
    assert abs(accuracy(PeftModel.from_pretrained(plain, str(tmp_path))) - reached) <= 0.03
    if engine == "llamacpp":
        check_gguf(tmp_path)


def check_gguf(folder: Path) -> None:
    """`adapter.gguf` has PEFT's matrices, with the scaling of 8 / 4 and the rows of a GGUF."""
    reader = importlib.import_module("gguf").GGUFReader(folder / "adapter.gguf")
    written = {tensor.name: torch.from_numpy(tensor.data) for tensor in reader.tensors}
    saved = load_file(folder / "adapter_model.safetensors")
    for place, name in (("attn_q", "q_proj"), ("attn_v", "v_proj")):
        rows: Tensor = saved[f"base_model.model.model.layers.2.self_attn.{name}.lora_B.weight"] * 2
        if name == "q_proj":
            halves = [half for head in rows.split(32) for half in zip(head[:16], head[16:])]
            rows = torch.stack([row for half in halves for row in half])
        assert torch.equal(written[f"blk.2.{place}.weight.lora_b"], rows)


@pytest.mark.parametrize(("engine", "kind"), QUANTIZED)
def test_a_run_goes_on_bit_for_bit(engine: str, kind: str, bases: Any, tmp_path: Path) -> None:
    """On one machine and in the same build, an engine gives the same bits again."""
    settings = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
    model = bases(engine, kind)
    whole = trainer_of(tmp_path, engine, model, **settings)
    whole.train()
    resumed = trainer_of(tmp_path, engine, model, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    tiny.assert_same(tiny.theta(whole), tiny.theta(resumed))
    # Its journal alone gives the same, where the engine is not.
    resumed.save_model()
    argv = ["replay", str(tmp_path / "zo_journal"), "--model_name_or_path", str(tiny.MODEL)]
    assert main([*argv, "--output_dir", str(tmp_path / "replayed")]) == 0
    ours, theirs = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (tmp_path, tmp_path / "replayed")
    )
    tiny.assert_same(ours, theirs)


def test_the_command_line_trains_and_evaluates(
    bases: Any, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    quantized = bases("llamacpp", "Q4_0")
    changes = {"model_name_or_path": quantized, "engine": "llamacpp", "tokenizer_name": tiny.MODEL}
    changes |= {"eval_file": tmp_path / "test.jsonl", "engine_reference": tiny.MODEL}
    lines = (tiny.EMBEDDED / "test.jsonl").read_text().splitlines()[:40]
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    options = tiny.command_line(tmp_path / "out", **changes, max_steps=2)
    assert main(["train", *options, "--json"]) == 0
    trained = json.loads(capsys.readouterr().out)
    assert trained["strategy"] == "gv"
    assert trained["engine"]["loaded"] == "llamacpp q4_0"
    # Two steps of four candidates for each of four examples, the check, and evaluations.
    assert trained["engine"]["swaps"] >= 2 * 4 * 4
    assert 0 < trained["engine"]["seconds"] < trained["engine"]["training_seconds"]
    # The engine, its file and the tokenizer are those of the run, also seen from elsewhere.
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "out", "test.jsonl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["eval_loss"] == pytest.approx(
        trained["eval_loss_after"], 1e-5
    )
    assert main(["predict", "out", "test.jsonl", "--output_file", "answers.jsonl"]) == 0
    assert len(Path("answers.jsonl").read_text().splitlines()) == 40
    capsys.readouterr()
    # With another base the adapter is PyTorch's.
    options = ["--model_name_or_path", str(tiny.MODEL)]
    assert main(["evaluate", "out", "test.jsonl", *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["eval_loss"] != pytest.approx(
        trained["eval_loss_after"], 1e-3
    )


def test_rewards_are_trained_from_the_command_line(
    bases: Any, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    """A reward function and a metric, with eps chosen by the run; and its answers."""
    monkeypatch.chdir(tmp_path)
    code = "def reward(completion_ids, **_):\n    return [-len(ids) for ids in completion_ids]\n"
    Path("brevity.py").write_text(code)
    rows = [{"prompt": f"We ate at the {what}", "answers": ["cafe"]} for what in ("old", "new")]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"train_file": "rows.jsonl", "eval_file": "rows.jsonl", "tokenizer_name": tiny.MODEL}
    changes |= {"prompt_template": None, "label_words": None, "zo_eps": None, "max_steps": 1}
    goals = [{"reward_funcs": "brevity:reward"}, {"objective": "f1"}]
    for (engine, kind), goal in zip(QUANTIZED, goals):
        changes |= {"engine": engine, "model_name_or_path": bases(engine, kind)}
        folder = tmp_path / engine
        options = tiny.command_line(folder, **changes, **goal, max_completion_length=5)
        capsys.readouterr()
        assert main(["train", *options, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["steps"] == 1
        # The likelihood of what was drawn is not a line at the largest that is tried.
        assert told["calibrations"][0]["zo_eps"] < 0.5
        assert main(["predict", engine, "rows.jsonl", "--output_file", f"{engine}.jsonl"]) == 0
        assert len(Path(f"{engine}.jsonl").read_text().splitlines()) == 2


REFUSED = [
    ({"engine": "openvino"}, "reads a folder with openvino_model.xml"),
    ({"peft_type": "IA3"}, r"an engine takes plain LORA \(.*\), not .* of a IA3"),
    ({"load_in_8bit": True}, "--load_in_8bit is for a base in PyTorch"),
    ({"strategy": "guided"}, "strategy='guided' is not for engine='llamacpp'"),
    ({"strategy": "adam"}, "strategy='adam' is not for engine='llamacpp'"),
    ({"tune": "weights"}, "tune='weights' is not for engine='llamacpp'"),
    ({"engine": None}, "tokenizer_name has no meaning without an engine"),
    ({"model_name_or_path": tiny.MODEL}, "reads a GGUF file"),
    ({"tokenizer_name": None}, "give --tokenizer_name"),
    ({"model_name_or_path": tiny.EMBEDDED / "test.jsonl"}, "is no GGUF file"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_an_engine_cannot_do_is_refused(
    bases: Any, tmp_path: Path, changes: dict[str, Any], message: str, capsys: Any
) -> None:
    quantized = bases("llamacpp", "Q4_0")
    given = {"model_name_or_path": quantized, "engine": "llamacpp", "tokenizer_name": tiny.MODEL}
    options = tiny.command_line(tmp_path / "out", **{**given, **changes}, max_steps=2)
    assert main(["train", *options]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [("plan", "an engine's memory is not known"), ("readout", "an engine tells no hidden states")],
)
def test_what_needs_the_base_in_pytorch_is_refused(
    command: str, message: str, tmp_path: Path, capsys: Any
) -> None:
    options = tiny.command_line(tmp_path, engine="llamacpp", eval_file=None)
    assert main([command, *options]) == 2
    assert message in capsys.readouterr().err


def test_the_configuration_of_another_model_is_refused(bases: Any, tmp_path: Path) -> None:
    tiny.llama(num_hidden_layers=1).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny.MODEL).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"and the configuration 1, .* give the --tokenizer_name"):
        load_served(bases("llamacpp", "Q4_0"), "llamacpp", str(tmp_path))


def test_llamacpp_is_for_linux(monkeypatch: Any) -> None:
    pytest.importorskip("xllamacpp")
    pytest.importorskip("gguf")
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(UserError, match="as Linux has; use openvino"):
        llamacpp.LlamaCpp(Path("model.gguf"), tiny.llama().config)


def test_openvino_takes_an_adapter_after_another(bases: Any) -> None:
    """The base alone, then a LoRA on other modules than the last one."""
    base, _ = load_served(bases("openvino", "int4"), "openvino", tiny.MODEL)
    objective, batch = batches()["options"]
    alone = objective.losses(base, batch)
    for target in ("q_proj", "v_proj"):
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=[target])
        model = get_peft_model(base, config)
        torch.testing.assert_close(objective.losses(model, batch), alone)
        for module in model.modules():
            if isinstance(module, LoraLayer):
                torch.nn.init.normal_(module.lora_B["default"].weight)
        assert (objective.losses(model, batch) - alone).abs().max() > 1e-2
        base = model.unload()


def test_the_doctor_is_told_the_versions() -> None:
    packages = {"llamacpp": "xllamacpp", "openvino": "openvino"}
    there = {n: p for n, p in packages.items() if importlib.util.find_spec(p) is not None}
    expected = {name: importlib.metadata.version(package) for name, package in there.items()}
    assert installed() == dict.fromkeys(packages) | expected | {"vllm": "any server"}
