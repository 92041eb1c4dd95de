"""The int8 matmul of several candidates: what bitsandbytes gives for each of them by itself."""

import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from torch import nn

from zo_peft.core.lanes import Lanes
from zo_peft.models import int8


def layer(threshold: float) -> Linear8bitLt:
    torch.manual_seed(0)
    made = Linear8bitLt(32, 48, has_fp16_weights=False, threshold=threshold).to("cpu").eval()
    made.requires_grad_(False)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("chunk", [1, 48 * 5, 1 << 17])
def test_each_candidate_has_the_output_of_bitsandbytes_alone(
    dtype: torch.dtype, threshold: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "CHUNK", chunk)
    module, x = layer(threshold), torch.randn(6, 7, 32)
    x[0, 3, 5], x[1, 1, 9], x[5, 0, 0] = 7.0, -90.0, 6.0  # outliers of two candidates
    x[2, 2] = 0
    x = x.to(dtype)
    alone = torch.cat([module(rows) for rows in x.chunk(3)])
    lanes = Lanes({}, 12)
    with lanes.active({"layer": (module, "forward", int8.matmul)}, 14, 1, candidates=3):
        found = module(x)
    assert found.dtype == dtype
    assert torch.equal(found, alone)
    # The outliers of one candidate would round the others' rows in another way.
    assert torch.equal(module(x), alone) == (threshold == 0)
    # Rows that are not those of candidates in turn are taken together.
    lanes.candidates = 4
    assert torch.equal(int8.matmul(module, lanes, "layer", x), module(x))


def test_only_int8_layers_on_a_cpu_are_replaced() -> None:
    own = nn.Sequential(layer(6.0), nn.Linear(2, 2), Linear8bitLt(4, 4))
    own.append(Linear8bitLt(4, 4, has_fp16_weights=False, device="meta"))
    assert own[2].state.has_fp16_weights
    assert [*int8.base_replacements(own)] == ["0"]
