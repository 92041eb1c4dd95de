"""What a guided step keeps, computed from shapes, against passes that are made."""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from tiny import HEADS, LAYERS, VOCABULARY, WIDTH, bert, llama, opt
from torch import Tensor, nn

from zo_peft import UserError
from zo_peft.core.batch import Batch
from zo_peft.models.adapters import tuned_parameters
from zo_peft.models.guide import ResidualGuide
from zo_peft.models.guide_memory import GuideMemory
from zo_peft.objectives.scoring import ClassificationObjective, OptionObjective

RANK = 3
FAMILIES = {
    "llama": (llama, ["q_proj", "v_proj", "down_proj"]),
    "opt": (opt, ["q_proj", "v_proj", "fc2"]),
    "bert": (bert, ["query", "value", "output.dense"]),
}


def made(family: str, **settings: Any) -> PeftModel:
    make, targets = FAMILIES[family]
    kind = "SEQ_CLS" if family == "bert" else "CAUSAL_LM"
    config = LoraConfig(task_type=kind, r=RANK, target_modules=targets)
    return get_peft_model(make(**settings), config)


def planned(make: Callable[[], Any]) -> GuideMemory:
    with torch.device("meta"):
        return GuideMemory(make().eval())


def batch(rows: int, length: int) -> Batch:
    torch.manual_seed(0)
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, :3] = 0
    return Batch(
        {
            "input_ids": torch.randint(1, VOCABULARY, (rows, length)),
            "attention_mask": mask,
            "labels": torch.zeros(rows, dtype=torch.long),
            "rows": torch.arange(rows),
            "positions": torch.full((rows,), length - 1),
            "option_tokens": torch.tensor([[5, 6]] * rows),
        }
    )


def graph_bytes(model: PeftModel, given: Batch, exact_layers: int) -> int:
    """What autograd keeps of a pass, without parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    is_encoder = "bert" in type(model.get_base_model()).__name__.lower()
    objective = ClassificationObjective() if is_encoder else OptionObjective()
    guide = ResidualGuide(model.eval(), tuned_parameters(model), objective, exact_layers)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        guide.read(given)
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in parameters)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_graph_is_that_of_a_pass(family: str, attention: str) -> None:
    torch.manual_seed(0)
    model = made(family, attn_implementation=attention)
    memory = planned(lambda: made(family, attn_implementation=attention))
    assert memory.layers == LAYERS
    given = batch(4, 48)
    alone = graph_bytes(model, given, 0)
    for exact_layers in (1, LAYERS):
        true = graph_bytes(model, given, exact_layers) - alone
        assert memory.graph(4, 48, exact_layers) == pytest.approx(true, rel=0.05)
    assert memory.graph(4, 48, 0) == 0


@pytest.mark.parametrize(
    ("family", "written", "value_heads"),
    # Of an encoder, the adapters on both dense modules write into the residual stream.
    [("llama", 1, 2), ("opt", 1, HEADS), ("bert", 2, HEADS)],
)
def test_what_is_read_is_kept(family: str, written: int, value_heads: int) -> None:
    memory = planned(lambda: made(family))
    width, layers = WIDTH // HEADS, LAYERS - 1
    scored, token = (3 + written) * WIDTH, WIDTH + 2 * value_heads * width
    # Of long rows sums over the tokens are fewer than these.
    sums = WIDTH * width + HEADS * WIDTH
    assert memory.kept(5, 5, 5, 1) == 4 * 5 * layers * (scored + 5 * token)
    assert memory.kept(5, 99, 5, 1) == 4 * 5 * layers * (scored + sums)
    assert memory.kept(5, 99, 35, 1) == 4 * 5 * layers * (7 * scored + 99 * token)
    assert memory.kept(5, 9, 5, LAYERS) == memory.stacked(5, 9, 5, LAYERS) == 0
    # Few bytes are stacked at once, but attention weights that are many layer by layer.
    assert memory.stacked(5, 9, 5, 0) == LAYERS * memory.stacked(5, 9, 5, layers)
    assert memory.stacked(5, 9999, 5 * 9999, 0) == memory.stacked(5, 9999, 5 * 9999, layers)


def alive() -> int:
    """The bytes of all tensors that are there."""
    gc.collect()
    # Of fake tensors, which other tests have left, nothing is there.
    found = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter) and not x.is_meta]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}
    return sum(storages.values())


@pytest.mark.parametrize("length", [5, 48])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_what_is_kept_is_that_of_a_pass(family: str, length: int) -> None:
    seen, planned_bytes = list[int](), list[int]()
    for layers in (2, 4):
        given = batch(20, length)
        model = made(family, num_hidden_layers=layers).eval()
        memory = planned(partial(made, family, num_hidden_layers=layers))
        planned_bytes.append(memory.kept(20, length, 20, 0))
        guide = ResidualGuide(model, tuned_parameters(model), OptionObjective())
        guide.read(given)
        hooked = model.get_output_embeddings()
        with hooked.register_forward_pre_hook(lambda *_: seen.append(alive())):
            guide.read(given)
            with torch.no_grad():
                OptionObjective().losses(model, given)
        del guide, model, hooked
    more = seen[2] - seen[3] - (seen[0] - seen[1])
    most = planned_bytes[1] - planned_bytes[0]
    # Of OPT's queries, which are not turned, outputs need not be kept.
    assert 0.9 * most <= more <= most
    assert more == most or family == "opt"


def test_of_a_prefix_outputs_queries_and_weights_are_kept() -> None:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7)
    memory = planned(lambda: get_peft_model(llama(), config))
    assert memory.kept(5, 9, 5, 0) == 4 * 5 * LAYERS * (2 * WIDTH + 7 * HEADS)


def test_a_model_without_layers_is_refused() -> None:
    class Nothing(nn.Module):
        pass

    with pytest.raises(UserError, match="transformer layers"):
        planned(Nothing)
