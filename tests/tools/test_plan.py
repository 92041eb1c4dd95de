"""Plans from configurations alone, against bases that are loaded and runs that run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import BloomConfig, LlamaConfig, OPTConfig

from zo_peft import ZOConfig, ZOTrainer
from zo_peft.cli import main
from zo_peft.errors import UserError
from zo_peft.models.adapters import add_adapter
from zo_peft.models.loading import load_base, load_tokenizer, quantization_config
from zo_peft.models.memory import weight_bytes
from zo_peft.runs.arguments import DataArguments, ModelArguments
from zo_peft.tools.plan import PlanArguments, Planner, largest, plan

EMBEDDED = Path(__file__).parents[2] / "zo_peft" / "embedded" / "model"
BASES = {"float32": {}, "int8": {"load_in_8bit": True}, "nf4": {"load_in_4bit": True}}
TARGETS = ["q_proj", "v_proj"]
OPT_13B = {
    "hidden_size": 5120,
    "ffn_dim": 20480,
    "num_attention_heads": 40,
    "word_embed_proj_dim": 5120,
}


def config_folder(folder: Path, **sizes: Any) -> str:
    """A folder with an OPT's config.json, and nothing else."""
    OPTConfig(dtype="float16", **sizes).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def opt_13b(tmp_path_factory: pytest.TempPathFactory) -> str:
    return config_folder(tmp_path_factory.mktemp("opt-13b"), num_hidden_layers=40, **OPT_13B)


@pytest.fixture(scope="module")
def planner(opt_13b: str) -> Planner:
    """Of an OPT-13B in int8 on a GPU."""
    model = ModelArguments(opt_13b, load_in_8bit=True)
    return Planner(model, ZOConfig("out", num_candidates=8, zo_eps=1e-3), device="cuda")


def planned(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    """What `zo-peft plan --json` prints."""
    assert main(["plan", "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("base", BASES)
def test_weights_are_those_of_a_base_that_is_loaded(base: str) -> None:
    given = ModelArguments(str(EMBEDDED), **BASES[base])
    mine = Planner(given, ZOConfig("out")).weights
    quantization = quantization_config(given.load_in_8bit, given.load_in_4bit)
    model = load_base(str(EMBEDDED), quantization_config=quantization)
    assert mine == weight_bytes(model)
    scales = 0
    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            scales += 4 * module.out_features
        if isinstance(module, Linear4bit):
            scales += 4 * module.in_features * module.out_features // 64
    held = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    assert mine == sum(held.values()) + scales


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_what_is_not_quantized_keeps_its_dtype(base: str, dtype: Any) -> None:
    given = ModelArguments(str(EMBEDDED), dtype=dtype, **BASES[base])
    quantization = quantization_config(given.load_in_8bit, given.load_in_4bit)
    model = load_base(str(EMBEDDED), dtype=dtype, quantization_config=quantization)
    assert Planner(given, ZOConfig("out")).weights == weight_bytes(model)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("batch", "length"), [(2, 8), (8, 32)])
def test_predicts_the_candidates_of_a_forward(
    base: str, batch: int, length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ZOConfig(
        str(tmp_path),
        per_device_train_batch_size=batch,
        num_candidates=24,
        max_steps=1,
        zo_eps=1e-3,
        report_to=[],
    )
    given = ModelArguments(str(EMBEDDED), lora_target_modules=TARGETS, **BASES[base])
    quantization = quantization_config(given.load_in_8bit, given.load_in_4bit)
    trainer = ZOTrainer(
        load_base(str(EMBEDDED), quantization_config=quantization),
        args,
        train_dataset=[{"input_ids": [5] * length, "labels": [-100] * (length - 1) + [5]}] * batch,
        processing_class=load_tokenizer(str(EMBEDDED)),
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS),
    )
    seen = []
    forward = trainer.objective.losses

    def losses(model: Any, batch: Any) -> Any:
        seen.append(len(batch["input_ids"]))
        return forward(model, batch)

    monkeypatch.setattr(trainer.objective, "losses", losses)
    trainer.train()
    (count,) = Planner(given, args).candidates(batch, length)
    assert max(seen) == count * batch
    assert batch < 8 or count < 24


def test_the_parts_add_up(planner: Planner) -> None:
    """By hand: an OPT-13B in int8 with LoRA r=8 on query and value, batch 16 x 512."""
    layers, hidden, vocabulary = 40, 5120, 50272
    codes = layers * 12 * hidden * hidden
    scales = 4 * layers * (5 * hidden + 4 * hidden)
    biases_and_norms = 2 * (layers * (9 + 4) * hidden + 2 * hidden)
    embeddings = 2 * hidden * (vocabulary + 2048 + 2)
    adapter = layers * 2 * 2 * 8 * hidden
    memory = planner.forward_only(16, 512, 2)
    assert planner.tuned == adapter
    assert memory.weights == codes + scales + biases_and_norms + embeddings
    assert memory.adapter == 4 * adapter * 3
    # Of each lane two buffers, of twelve matrices each, are there at a time.
    assert memory.candidates == 4 * (2 * 12 * 8 * hidden) * 2 * 16
    assert memory.logits == 2 * 2 * 4 * 16 * vocabulary
    assert memory.activations == 2 * 16 * 512 * 14 * hidden * 2
    assert memory.kept == 0
    passes = memory.weights + memory.adapter + memory.candidates + memory.activations
    assert memory.peak == memory.step == passes
    gradients = planner.with_gradients(16, 512)
    assert gradients.adapter == 4 * adapter * 4
    assert gradients.kept == layers * 16 * 512 * hidden * 4
    assert gradients.weights == memory.weights + biases_and_norms + embeddings
    assert gradients.peak > memory.peak


@pytest.mark.parametrize("scored", [1, 512])
def test_an_evaluation_is_a_forward_of_its_own_batch(opt_13b: str, scored: int) -> None:
    """By hand: 32 examples of 512 tokens, of which an evaluation has no second candidate."""
    hidden, vocabulary = 5120, 50272
    args = ZOConfig("out", num_candidates=8, zo_eps=1e-3, per_device_eval_batch_size=32)
    planner = Planner(ModelArguments(opt_13b), args, scored, device="cuda")
    forward = max(32 * 512 * 14 * hidden * 2, 2 * 4 * 32 * scored * vocabulary)
    memory = planner.forward_only(1, 512, 1)
    assert memory.evaluate == memory.weights + memory.adapter + forward
    assert memory.peak == memory.evaluate > memory.step
    fewer = planner.forward_only(1, 512, 1, eval_batch=1)
    assert replace(memory, evaluate=fewer.evaluate, peak=fewer.peak) == fewer
    assert fewer.evaluate < memory.evaluate
    gradients = planner.with_gradients(1, 512)
    assert gradients.evaluate == gradients.weights + gradients.adapter + forward
    assert gradients.peak == max(gradients.evaluate, gradients.step)


def test_an_evaluation_alone_may_be_what_does_not_fit(opt_13b: str) -> None:
    """Then it is the evaluation alone that the proposal makes smaller."""
    args = ZOConfig("out", zo_eps=1e-3, per_device_train_batch_size=4, max_length=512)
    args.per_device_eval_batch_size = 256
    result = plan(
        PlanArguments("24GB"), ModelArguments(opt_13b, load_in_8bit=True), DataArguments(), args
    )
    assert not result["fits"]
    assert result["proposal"] == {"per_device_eval_batch_size": 1}
    found = result["largest"]
    assert 1 < found["per_device_eval_batch_size"] < 256
    assert found["per_device_train_batch_size"] == found["candidates_per_forward"] == 0
    args.per_device_eval_batch_size = found["per_device_eval_batch_size"]
    planner = Planner(ModelArguments(opt_13b, load_in_8bit=True), args, device="cuda")
    room = 24 * 10**9 - result["reserved"]
    assert planner.forward_only(4, 512, 1).peak <= room
    args.per_device_eval_batch_size += 1
    assert planner.forward_only(4, 512, 1).peak > room


@given(
    batch=st.integers(1, 64), length=st.integers(1, 1024), limit=st.integers(1, 8), more=st.data()
)
def test_more_takes_more(
    planner: Planner, batch: int, length: int, limit: int, more: st.DataObject
) -> None:
    memory = planner.forward_only(batch, length, limit)
    sizes = {"batch": batch, "length": length, "limit": limit}
    name = more.draw(st.sampled_from(sorted(sizes)))
    larger = sizes | {name: sizes[name] + more.draw(st.integers(1, 64))}
    assert planner.forward_only(**larger).peak >= memory.peak
    assert memory.peak >= memory.weights + memory.adapter
    if name != "limit":
        del larger["limit"]
        assert planner.with_gradients(**larger).peak >= planner.with_gradients(batch, length).peak


@given(st.integers(0, 1000), st.integers(1, 900))
def test_largest_finds_the_edge(edge: int, most: int) -> None:
    assert largest(lambda number: number <= edge, most) == min(edge, most)


def test_the_largest_fit_and_one_more_does_not(
    opt_13b: str, planner: Planner, capsys: pytest.CaptureFixture[str]
) -> None:
    """A 13B is planned from its config.json alone: the folder holds nothing else."""
    result = planned(
        capsys,
        *("--model_name_or_path", opt_13b, "--load_in_8bit", "True", "--gpu_memory", "24GB"),
        *("--per_device_train_batch_size", "16", "--max_length", "512", "--num_candidates", "8"),
        *("--zo_eps", "0.001"),
    )
    assert result["fits"]
    assert not result["gradients_fit"]
    assert result["proposal"] == {}
    assert result["gpu_memory"] == 24 * 10**9
    room = 24 * 10**9 - result["reserved"]
    batch = result["largest"]["per_device_train_batch_size"]
    assert planner.forward_only(batch, 512, 1).peak <= room
    assert planner.forward_only(batch + 1, 512, 1).peak > room
    count = result["largest"]["candidates_per_forward"]
    assert 1 < count < 8
    assert planner.forward_only(16, 512, count).peak <= room
    assert planner.forward_only(16, 512, count + 1).peak > room
    assert result["largest"]["max_length"] == 2048
    assert result["forward_only"]["peak"] < result["gradients"]["peak"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four of the 40 layers of an OPT-13B."""
    return config_folder(tmp_path_factory.mktemp("wide"), num_hidden_layers=4, **OPT_13B)


@pytest.mark.parametrize(
    ("gpu_memory", "expected"),
    [
        ("5.4GB", {"candidates_per_forward": 1}),
        ("4.5GB", {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}),
        ("4GB", {"load_in_8bit": True, "per_device_train_batch_size": 8}),
        ("3GB", {"load_in_4bit": True}),
    ],
)
def test_the_proposal_fits(gpu_memory: str, expected: dict[str, Any], wide: str) -> None:
    """And the batch as a whole stays as large as it was."""
    given = {"per_device_train_batch_size": 16, "max_length": 512, "candidates_per_forward": 4}
    args = ZOConfig("out", num_candidates=8, zo_eps=1e-3, **given)
    model = ModelArguments(wide)
    result = plan(PlanArguments(gpu_memory), model, DataArguments(), args)
    assert not result["fits"]
    proposal = result["proposal"]
    assert expected.items() <= proposal.items()
    bits = {name: value for name, value in proposal.items() if name.startswith("load_in")}
    settings = {name: value for name, value in proposal.items() if name not in bits}
    follow = ZOConfig("out", num_candidates=8, zo_eps=1e-3, **given | settings)
    again = plan(PlanArguments(gpu_memory), replace(model, **bits), DataArguments(), follow)
    assert again["fits"]
    whole = follow.per_device_train_batch_size * follow.gradient_accumulation_steps
    assert whole == 16


def test_nothing_fits_into_too_little(wide: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model_name_or_path", wide, "--max_length", "512", "--gpu_memory", "2GB"]
    result = planned(capsys, *options)
    assert result["proposal"] is None
    assert result["least"]["options"] == {"load_in_4bit": True}
    assert result["least"]["max_length"] == 0
    assert result["least"]["peak_of_a_token"] > 2 * 10**9 - result["reserved"]
    assert main(["plan", *options]) == 0
    told = capsys.readouterr().out
    assert "at any max_length: one token with --load_in_4bit True takes" in told
    assert "lower" not in told


@pytest.mark.parametrize(("tune", "options"), [("adapter", "load_in_4bit"), ("weights", "8bit")])
def test_where_only_the_length_is_too_much_it_says_which_fits(
    tune: Any, options: str, wide: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights are tuned in 8 bits at the least."""
    given = ["--model_name_or_path", wide, "--completion_length", "2048", "--tune", tune]
    given += ["--gpu_memory", "2.9GB" if tune == "adapter" else "3.3GB"]
    least = planned(capsys, *given)["least"]
    assert options in next(iter(least["options"]))
    assert 0 < least["max_length"] < 2048
    shorter = [*given, "--max_length", str(least["max_length"])]
    assert planned(capsys, *shorter)["proposal"].items() >= least["options"].items()
    longer = [*given, "--max_length", str(least["max_length"] + 1)]
    assert planned(capsys, *longer)["proposal"] is None
    assert main(["plan", *given]) == 0
    told = capsys.readouterr().out
    assert f"{least['max_length']:,} tokens fits; lower max_length" in told
    assert options in told


def test_a_base_of_another_quantization_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    OPTConfig(num_hidden_layers=1, quantization_config=saved).save_pretrained(tmp_path)
    for asked in ([], ["--load_in_8bit", "True"]):
        assert main(["plan", "--model_name_or_path", str(tmp_path), *asked]) == 2
        assert f"{tmp_path.name}, quantized by gptq, is not planned" in capsys.readouterr().err


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_base_that_bitsandbytes_quantized_is_planned(bits: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 192, "word_embed_proj_dim": 192, "ffn_dim": 768}
    sizes |= {"num_hidden_layers": 2, "dtype": "float32"}
    asked = ModelArguments(str(tmp_path), **{f"load_in_{bits}": True})
    config = OPTConfig(**sizes)
    config.save_pretrained(tmp_path)
    mine = Planner(asked, ZOConfig("out")).weights
    given = quantization_config(asked.load_in_8bit, asked.load_in_4bit)
    OPTConfig(**sizes, quantization_config=given.to_dict()).save_pretrained(tmp_path)
    assert Planner(ModelArguments(str(tmp_path)), ZOConfig("out")).weights == mine


def test_a_4bit_width_that_some_cpus_decode_wrongly_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = config_folder(tmp_path, hidden_size=768, ffn_dim=800, num_hidden_layers=1)
    options = ["--model_name_or_path", folder, "--load_in_4bit", "True"]
    assert main(["plan", *options]) == 2
    assert "decoder.layers.0.fc2 has 800 input features" in capsys.readouterr().err
    assert planned(capsys, *options, "--gpu_memory", "8GB")["fits"]


def test_a_length_that_the_base_does_not_take_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["plan", "--model_name_or_path", str(EMBEDDED), "--max_length"]
    assert main([*options, "256"]) == 0
    assert main([*options, "257"]) == 2
    assert "takes at most 256 tokens" in capsys.readouterr().err


def test_a_base_that_says_no_length_needs_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    BloomConfig(hidden_size=64, n_head=4, n_layer=2, vocab_size=1000).save_pretrained(tmp_path)
    options = ["--model_name_or_path", str(tmp_path)]
    assert main(["plan", *options]) == 2
    assert "give --max_length" in capsys.readouterr().err
    assert planned(capsys, *options, "--max_length", "4096")["max_length"] == 4096


@pytest.mark.parametrize(("count", "told"), [(1, "1 candidate a"), (2, "2 candidates a")])
def test_candidates_are_counted(count: int, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model_name_or_path", str(EMBEDDED), "--candidates_per_forward", str(count)]
    assert main(["plan", *options]) == 0
    assert told in capsys.readouterr().out


@pytest.mark.parametrize("peft_type", ["LORA", "PREFIX_TUNING", "PROMPT_TUNING", "IA3", "VERA"])
def test_adapters_of_all_kinds(peft_type: str) -> None:
    """As many numbers as the adapter on a base that is loaded."""
    given = ModelArguments(str(EMBEDDED), peft_type=peft_type)
    mine = Planner(given, ZOConfig("out"))
    tuned = add_adapter(load_base(str(EMBEDDED)), given.peft_config())
    assert mine.tuned == sum(p.numel() for p in tuned.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("settings", "guided"),
    [({}, True), ({"peft_type": "PREFIX_TUNING"}, True), ({"peft_type": "IA3"}, False)],
    ids=str,
)
def test_the_default_strategy_is_that_of_a_trainer(settings: dict[str, Any], guided: bool) -> None:
    planner = Planner(ModelArguments(str(EMBEDDED), **settings), ZOConfig("out"))
    assert (planner.guide is not None) == guided == (planner.args.strategy == "guided")
    assert (Planner(planner.model, ZOConfig("out"), generates=True).guide is not None) == guided
    greedy = ZOConfig("out", temperature=0.0)
    assert Planner(planner.model, greedy, generates=True).guide is None


@pytest.mark.parametrize("tune", ["scales", "weights"])
def test_a_base_that_is_tuned_itself(tune: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ["--model_name_or_path", str(EMBEDDED), "--load_in_8bit", "True", "--tune", tune]
    result = planned(capsys, *folder)
    assert result["gradients"] is None
    memory = result["forward_only"]
    assert memory["weights"] < memory["step"] < 2**25


def test_a_train_command_is_a_plan_by_its_verb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Data need not be there, nothing is written, and the table has both ways."""
    monkeypatch.chdir(tmp_path)
    options = ["--model_name_or_path", str(EMBEDDED), "--train_file", "missing.tsv"]
    assert main(["plan", *options, "--output_dir", "out", "--max_length", "64"]) == 0
    told = capsys.readouterr().out
    assert "forward only" in told
    assert "with gradients" in told
    assert str(EMBEDDED) not in told
    assert list(tmp_path.iterdir()) == []


def test_wide_logits_count(tmp_path: Path) -> None:
    LlamaConfig(
        vocab_size=128256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
    ).save_pretrained(tmp_path)
    given, args = ModelArguments(str(tmp_path)), ZOConfig("out", zo_eps=1e-3)
    one, all_scored = (Planner(given, args, scored).forward_only(8, 64, 1) for scored in (1, 64))
    assert all_scored.logits == 64 * one.logits == 2 * 4 * 8 * 64 * 128256
    assert all_scored.peak - one.peak > all_scored.logits // 2


@pytest.mark.parametrize("length", ["0", "-1"])
def test_something_must_be_scored(length: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model_name_or_path", str(EMBEDDED), "--completion_length", length]
    assert main(["plan", *options]) == 2
    assert "1 or more" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["lots", "24", "-3GB", "24 parsecs", "100MB"])
def test_a_size_that_is_none_is_refused(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["plan", "--model_name_or_path", str(EMBEDDED), f"--gpu_memory={size}"])
    assert code == 2
    assert "24GB" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model_name_or_path", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot be loaded"):
        Planner(ModelArguments("no/such-model"), ZOConfig("out"))


def test_an_adapter_that_is_there_counts(tmp_path: Path) -> None:
    LoraConfig(task_type="CAUSAL_LM", r=32, target_modules=TARGETS).save_pretrained(tmp_path)
    saved = ModelArguments(str(EMBEDDED), adapter_name_or_path=str(tmp_path))
    new = ModelArguments(str(EMBEDDED), lora_r=8, lora_target_modules=TARGETS)
    args = ZOConfig("out")
    assert Planner(saved, args).tuned == 4 * Planner(new, args).tuned
    with pytest.raises(UserError, match="cannot be loaded"):
        Planner(replace(saved, adapter_name_or_path=str(tmp_path / "none")), args)


def guided(**settings: Any) -> ZOConfig:
    return ZOConfig("out", strategy="guided", zo_eps=1e-3, **settings)


def test_a_guided_run_keeps_what_it_reads_and_differentiates(opt_13b: str) -> None:
    """By hand: an OPT-13B in int8 with LoRA r=8 on query and value, batch 16 x 512."""
    hidden, heads, width = 5120, 40, 128
    given = ModelArguments(opt_13b, load_in_8bit=True)
    planner = Planner(given, guided(), device="cuda")
    query = heads * width * width + 2 * hidden + hidden
    errors = 2 * 4 * 16 * hidden
    memory = planner.forward_only(16, 512, 1)
    assert memory.kept == 40 * 16 * 2 * (query + heads * hidden) + errors
    # An exact layer keeps nine tensors of the width, the inputs of two LoRAs in float32, the
    # activations of the MLP, and a mask; the rest is small.
    one = planner.forward_only(16, 512, 1, exact_layers=1).kept - memory.kept * 39 // 40
    assert one == pytest.approx(
        16 * 512 * (2 * (8 * hidden + 4 * hidden + 512) + 4 * hidden), rel=0.05
    )
    peaks = [planner.forward_only(16, 512, 1, exact_layers=k).peak for k in range(0, 41, 8)]
    assert peaks == sorted(peaks)
    assert peaks[0] < peaks[1]


def test_the_most_exact_layers_fit_and_one_more_does_not(
    opt_13b: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model_name_or_path", opt_13b, "--load_in_8bit", "True", "--gpu_memory", "24GB"]
    options += ["--max_length", "256", "--strategy", "guided", "--zo_eps", "0.001"]
    result = planned(capsys, *options)
    found = result["largest"]["exact_layers"]
    assert 0 < found < 40
    assert planned(capsys, *options, "--exact_layers", str(found))["fits"]
    assert not planned(capsys, *options, "--exact_layers", str(found + 1))["fits"]
    assert main(["plan", *options]) == 0
    assert f"exact_layers {found}" in capsys.readouterr().out
    assert "exact_layers" not in planned(capsys, *options[:8], "--strategy", "gv")["largest"]


@pytest.mark.parametrize("bits", BASES)
@pytest.mark.parametrize("peft_type", ["LORA", "PREFIX_TUNING", "IA3"])
def test_guided_runs_are_planned_on_every_base(peft_type: str, bits: str) -> None:
    given = ModelArguments(str(EMBEDDED), peft_type=peft_type, **BASES[bits])
    memory = Planner(given, guided(exact_layers=1), 3).forward_only(4, 32)
    assert memory.step > memory.weights + memory.kept > memory.weights


@pytest.mark.parametrize(
    ("options", "told"),
    [(["--exact_layers", "9"], "layers"), (["--tune", "scales", "--load_in_8bit", "True"], "tune")],
)
def test_what_has_no_guide_is_refused(
    options: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model_name_or_path", str(EMBEDDED), "--strategy", "guided", "--max_length", "64"]
    assert main(["plan", *words, *options]) == 2
    assert told in capsys.readouterr().err


def test_no_number_is_made(opt_13b: str) -> None:
    """All of the base is on the meta device, where tensors have no bytes."""
    made = Planner(ModelArguments(opt_13b), ZOConfig("out"))
    assert {p.device for p in made.space.parameters.values()} == {torch.device("meta")}
