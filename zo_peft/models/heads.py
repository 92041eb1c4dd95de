"""Attention as the scored positions see it, and what its heads tell of an adapter's gradient.

Every attention of transformers is called through one interface, with queries, keys and values by
head. From these the weights of the scored positions alone are computed once more; with the error at
the heads' outputs they give the gradients of values, queries and prefixes in closed form. That is
done for several layers at a time, because a GPU waits for each operation that it is given.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from zo_peft.core.batch import Batch
from zo_peft.core.guide import at_queries, covariance, low_rank, unrotated
from zo_peft.models.peft_layers import is_plain_lora

#: A tuned parameter of each of L layers, and their gradients of each of P parts: [L, P, ...].
Found = tuple[list[nn.Parameter], Tensor]

#: How far rounding may take attention weights and rotations from what is expected.
ROUNDING = 2e-2
#: So many layers are stacked that these take at most so many bytes, or this share of what is kept.
FEW, SHARE = 16 << 20, 0.25


class Scored:
    """The positions of a batch that the loss sees: those with a label, or else all tokens.

    They are a grid [B, n] with the most that a row has; others have some that are not `real`.

    Attributes:
        count, length: the rows of the batch, and their tokens without virtual ones.
        single: whether each row has exactly one such position.
    """

    def __init__(self, batch: Batch) -> None:
        ids = batch["input_ids"]
        (self.count, self.length), device = ids.shape, ids.device
        if "rows" in batch:
            # Options of one prompt have positions in common.
            self.real = torch.zeros_like(ids, dtype=torch.bool)
            self.real[batch["rows"], batch["positions"]] = True
        else:
            self.real = batch.get("attention_mask", torch.ones_like(ids)).bool()
        self._biases: dict[Any, tuple[Tensor | None, Tensor | None]] = {}
        counts = self.real.sum(dim=1).tolist()
        self.each, self.single, self._full = max(counts), {*counts} == {1}, len({*counts}) == 1
        self._rows = torch.arange(self.count, device=device)[:, None]
        self.positions = torch.arange(self.length, device=device).expand(self.count, -1)
        if self.each < self.length:
            order = self.real.int().sort(dim=1, descending=True, stable=True).indices
            self.positions = order[:, : self.each]
            self.real = self.real.gather(1, self.positions)
            # The last token sees some, whatever side is padded.
            self.positions = self.positions.where(self.real, self.length - 1)

    def of(self, x: Tensor) -> Tensor:
        """[B, n, ...] of [B, T, ...]; virtual tokens stand in front of each row."""
        if x.shape[1] == self.each:
            return x
        virtual = x.shape[1] - self.length
        return x[self._rows, self.positions + virtual if virtual else self.positions]

    def errors(self, x: Tensor) -> Tensor:
        """As `of`, of errors: zero where a position is not real."""
        return self.of(x) if self._full else self.of(x) * self.real[..., None]

    def bias(self, mask: Tensor | None, query: Tensor, key: Tensor, causal: bool) -> Tensor | None:
        """What is added to scores, [B * groups, m, S]; most layers have the same.

        Args:
            mask: [B or 1, 1 or heads, T or 1, S], added or True where a position is seen. Without
                one, those of a `causal` attention see what is before them. Flash attention has one
                [B, S] of the tokens that are no padding.
            query, key: [B, heads, T, width] and [B, groups, S, width].
        """
        (_, heads, length, _), (_, groups, total, _), dtype = query.shape, key.shape, query.dtype
        like = id(mask), heads, groups, length, total, causal
        if like in self._biases or (mask is None and (length == 1 or not causal)):
            return self._biases.get(like, (None, None))[1]
        where = self.positions + (length - self.length)
        if mask is None or mask.dim() == 2:
            last = where[:, None, :, None] + (total - length * causal)
            seen = torch.arange(total, device=where.device) <= last
            seen = seen if mask is None else seen & mask.bool()[:, None, None]
        else:
            seen = mask.expand(self.count, -1, length, -1)[self._rows, :, where].transpose(1, 2)
        if seen.dtype == torch.bool:
            seen = torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf)
        bias = seen[..., :total].to(dtype).expand(-1, heads, -1, -1)
        # The mask is kept, so that no other one has its id.
        self._biases[like] = mask, bias.reshape(self.count * groups, -1, total)
        return self._biases[like][1]


@dataclass
class Role:
    """What is known of an attention module, once it has been called.

    Attributes:
        agrees: its outputs are those of the weights that are computed here.
        value, query: the LoRAs that make its values and queries, if there are any.
        scale: what its queries are times the output of `query`; None where they are also turned.
        out: the linear module that its outputs go into; without one nothing is read.
    """

    agrees: bool = False
    value: nn.Module | None = None
    query: nn.Module | None = None
    scale: float | None = None
    out: nn.Module | None = None


@dataclass
class Call:
    """One call of an attention, with what the closed forms need of it.

    Attributes:
        index: of the attentions of a pass.
        heads, groups: how many there are, and of keys and values, which serve equally many each.
        bias: as of `Scored.bias`.
        kept: by name. `query` at the scored positions, [B, n, heads, width]; `key` and `value`,
            [B, groups, S, width]; `inputs` of the LoRA on the values, [B, S, in]; `asked` and
            `made`, input and output of that on the queries at the scored positions; `output`
            there, [B, n, heads * width], of a prefix.
    """

    role: Role
    index: int
    heads: int
    groups: int
    scaling: float
    bias: Tensor | None
    kept: dict[str, Tensor]

    @property
    def like(self) -> tuple[Any, ...]:
        """What is the same of calls that can be stacked."""
        kept = ((name, x.shape, x.dtype, x.device) for name, x in self.kept.items())
        loras = (lora and lora_settings(lora) for lora in (self.role.value, self.role.query))
        return (self.groups, self.scaling, id(self.bias), self.role.scale, *loras, *kept)

    @property
    def size(self) -> int:
        """The bytes of what is kept, and of attention weights and errors of them."""
        own, key = sum(x.nbytes for x in self.kept.values()), self.kept.get("key")
        return own if key is None else own + 3 * key.shape[2] * self.kept["query"][..., 0].nbytes


class Heads:
    """Calls of L layers, stacked. The m scored positions of a group's heads are one matrix."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls, self.kept, self.role = calls, calls[0].kept.keys(), calls[0].role
        self.heads, self.groups = calls[0].heads, calls[0].groups
        self.scaling, self.bias = calls[0].scaling, calls[0].bias

    def of(self, name: str) -> Tensor:
        """[L, ...]."""
        return stacked([call.kept[name] for call in self.calls])

    @cached_property
    def key(self) -> Tensor:
        """[L, B, groups, S, width]."""
        return self.of("key").contiguous()

    @cached_property
    def weights(self) -> Tensor:
        """[L, B, groups, m, S]."""
        query = self.by_group(self.of("query"))
        shape, query, keys = query.shape[:-1], query.flatten(0, 2), self.key.flatten(0, 2).mT
        bias = query[..., :1]
        if self.bias is not None:
            bias = self.bias.expand(shape[0], -1, -1, -1).flatten(0, 1)
        scores = torch.baddbmm(bias, query, keys, beta=self.bias is not None, alpha=self.scaling)
        return scores.softmax(dim=-1).view(*shape, -1)

    def by_group(self, x: Tensor) -> Tensor:
        """[L, B, groups, m, width] of [L, B, n, heads, width]."""
        return x.unflatten(3, (self.groups, -1)).permute(0, 1, 3, 4, 2, 5).flatten(3, 4)

    def by_position(self, x: Tensor, each: int) -> Tensor:
        """[L, B, n, heads, width] of [L, B, groups, m, width]."""
        return x.unflatten(3, (-1, each)).permute(0, 1, 4, 2, 3, 5).flatten(3, 4)

    def sum_up(self, virtual: int) -> None:
        """Keep sums over the tokens of a layer in their place, where a row has one scored position.

        These are the `inputs` of each head, [B, heads, in], and what `carries` errors to queries,
        [B, groups, m, width, width]. Of a prefix of `virtual` tokens their `weights` are kept.
        """
        sums = dict[str, Tensor]()
        if "inputs" in self.kept:
            sums["inputs"] = self.weights.flatten(2, 3) @ self.of("inputs").to(self.weights.dtype)
        if "asked" in self.kept:
            sums["carries"] = covariance(self.weights, self.key, self.of("value"))
        if virtual:
            sums["weights"] = self.weights[..., :virtual].clone()
        stay = {"asked", "made", "output", "query" if self.kept & {"made", "output"} else ""}
        rest = {name: self.calls[0].kept[name] for name in stay & self.kept}
        self.calls[0].kept = rest | {name: x[0] for name, x in sums.items()}

    def gradients(
        self, errors: Tensor, unit: Tensor, parts: int, prefix: nn.Parameter
    ) -> Iterator[Found]:
        """The gradients of LoRAs on values and queries, or of a prefix, from errors at the outputs
        of the heads, [L, B, n, heads * width], in this unit.
        """
        if "output" in self.kept:
            yield self._of_prefix(prefix, errors, unit, parts)
        own = self.by_group(errors.unflatten(3, (self.heads, -1)))
        weights = self.weights if "key" in self.kept else None
        if "inputs" in self.kept:
            loras, inputs = [call.role.value for call in self.calls], self.of("inputs")
            pairs = [] if weights is None else [weights.flatten(2, 3)]
            yield from lora_gradients(loras, unit, parts, own, inputs.to(own.dtype), *pairs)
        if "asked" in self.kept:
            if weights is None:
                own = (self.of("carries") @ own[..., None])[..., 0]
            else:
                own = at_queries(own, weights, self.key, self.of("value"))
            own, loras = self.by_position(own, errors.shape[2]), [c.role.query for c in self.calls]
            if "made" in self.kept:
                own = unrotated(own, self.of("made").view_as(own), self.of("query"))
            unit, own = self.scaling * (self.role.scale or 1.0) * unit, own.flatten(3)[:, :, None]
            yield from lora_gradients(loras, unit, parts, own.float(), self.of("asked").float())

    def _of_prefix(self, prefix: nn.Parameter, errors: Tensor, unit: Tensor, parts: int) -> Found:
        """The keys and values of a prefix stand in front of those of the tokens."""
        by_part, split = (1, (parts, -1)), (3, (self.heads, -1))
        own, outputs = (self.by_group(x.unflatten(*split)) for x in (errors, self.of("output")))
        weights, query = self.of("weights"), self.by_group(self.of("query"))
        count, layers = weights.shape[-1], [call.index for call in self.calls]
        values = prefix.detach().view(count, -1, 2, self.groups, own.shape[-1])[:, layers, 1]
        scores = torch.einsum("lrgmw,plgw->lrgmp", own, values.to(own.dtype))
        scores = weights * (scores - (own * outputs).sum(dim=-1, keepdim=True))
        terms = (self.scaling * scores, query), (weights, own)
        pairs = [[x.unflatten(*by_part) for x in pair] for pair in terms]
        found = [torch.einsum("lqrgmp,lqrgmw->qplgw", *pair) for pair in pairs]
        gradient = prefix.new_zeros(1, parts, *prefix.shape, dtype=torch.float32)
        places = gradient.view(parts, count, -1, 2, self.groups, own.shape[-1])
        places[:, :, layers] = unit * torch.stack(found, dim=3)
        return [prefix], gradient


def lora_gradients(
    loras: Sequence[Any], unit: Tensor, parts: int, errors: Tensor, inputs: Tensor, *weights: Tensor
) -> Iterator[Found]:
    """As `low_rank`, of all rows in one dimension and of errors in this unit, float32 [1]."""
    matrices = [list(pair) for pair in zip(*map(lora_parameters, loras))]
    a, b = (stacked(matrix).detach().to(errors.dtype) for matrix in matrices)
    own, x, *pairs = (t.unflatten(1, (parts, -1)) for t in (errors, inputs, *weights))
    scale = unit * lora_settings(loras[0])[-1]
    yield from zip(matrices, (scale * gradient for gradient in low_rank(own, x, a, b, *pairs)))


def role_of(
    module: nn.Module, call: Call, query: Tensor, output: Tensor, made: dict[nn.Module, Tensor]
) -> Role:
    """Find the role of an attention, from its query [B, heads, T, width], its output at the scored
    positions [B, n, heads, width], and the outputs that modules of its layer have `made` so far.
    """
    heads = Heads([call])
    computed = heads.by_position(heads.weights @ heads.of("value"), output.shape[1])[0]
    role, value = Role(_near(computed, output)), call.kept["value"]
    for candidate in filter(is_plain_lora, module.modules()):
        if (y := made.get(candidate)) is None or y.shape[-1] % query.shape[-1]:
            continue
        y = y.unflatten(-1, (-1, query.shape[-1])).transpose(1, 2)
        if y.shape == value.shape and torch.equal(y, value):
            role.value = candidate
        elif y.shape == query.shape and _turned(y, query):
            # In few digits, which are the same whatever the first batch is.
            scale = float(f"{float(query.float().norm() / y.float().norm()):.3g}")
            # A single token is not turned, whatever the attention does with others.
            same = y.shape[2] > 1 and _near(scale * y, query)
            role.query, role.scale = candidate, scale if same else None
    return role


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """[L, ...]; of one tensor without a copy."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack([*tensors])


def at_once(size: int, count: int) -> int:
    """How many of `count` layers, each with `size` bytes that are kept, are stacked at a time."""
    return max(1, int(max(FEW, SHARE * count * size)) // size)


def sums_are_fewer(
    heads: int, width: int, groups: int, tokens: int, inputs: int, queries: bool
) -> bool:
    """Whether sums are fewer numbers than a row's inputs of values, keys, and values of queries."""
    whole = tokens * (inputs + (1 + queries) * groups * width)
    return heads * (inputs + queries * width**2) < whole


def lora_parameters(module: Any) -> list[nn.Parameter]:
    """A and B of a LoRA."""
    name = module.active_adapters[0]
    return [module.lora_A[name].weight, module.lora_B[name].weight]


def lora_settings(module: Any) -> tuple[torch.Size, torch.Size, float]:
    """The shapes of A and B of a LoRA, and its scaling."""
    a, b = lora_parameters(module)
    return a.shape, b.shape, module.scaling[module.active_adapters[0]]


def _turned(before: Tensor, after: Tensor) -> bool:
    """Whether queries are those before, each of their pairs turned and all scaled by one number."""
    sizes = [torch.complex(*x.float().chunk(2, dim=-1)).abs() for x in (before, after)]
    return _near(sizes[0] * (sizes[1].norm() / sizes[0].norm()), sizes[1])


def _near(x: Tensor, y: Tensor) -> bool:
    return torch.allclose(x.float(), y.float(), rtol=ROUNDING, atol=ROUNDING * float(y.abs().max()))
