"""Attention as the scored positions see it, and what its heads tell of an adapter's gradient.

Every attention of transformers is called through one interface, with queries, keys and values by
head. From these the weights of the scored positions alone are computed once more; with the error at
the heads' outputs they give the gradients of values, queries and prefixes in closed form.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from zo_peft.core.batch import Batch
from zo_peft.core.guide import at_queries, at_values, covariance, low_rank, mixed, unrotated
from zo_peft.models.peft_layers import is_plain_lora, lora_factors

#: Errors [N, width] in; out come gradients by tuned parameter.
Reading = Callable[[Tensor], list[tuple[nn.Parameter, Tensor]]]

#: How far rounding may take attention weights and rotations from what is expected.
ROUNDING = 2e-2


class Scored:
    """The N positions of a batch that the loss sees: those with a label, or else all tokens.

    Attributes:
        count, length: the rows of the batch, and their tokens without virtual ones.
        single: whether each row has exactly one such position.
    """

    def __init__(self, batch: Batch) -> None:
        if "rows" in batch:
            self.rows, self.positions = batch["rows"], batch["positions"]
        else:
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            self.rows, self.positions = mask.nonzero(as_tuple=True)
        self.count, self.length = batch["input_ids"].shape
        counts = self.rows.bincount(minlength=self.count).tolist()
        self.single = set(counts) == {1}
        #: How many each row has, where they are equally many.
        self._each = counts[0] if len(set(counts)) == 1 else None

    def of(self, x: Tensor, some: Tensor | slice = slice(None)) -> Tensor:
        """[N, ...] of [B, T, ...], or some of them; virtual tokens stand in front of each row."""
        return x[self.rows[some], _shifted(self.positions[some], x.shape[1] - self.length)]

    def chunks(self) -> list[tuple[slice, Tensor]]:
        """R rows and positions [R, n] in the order of `of`: all rows at once, or one by one."""
        if self._each:
            return [(slice(None), self.positions.view(-1, self._each))]
        rows = self.rows.unique().tolist()
        return [(slice(row, row + 1), self.positions[self.rows == row][None]) for row in rows]


@dataclass(frozen=True)
class Attended:
    """What R rows of an attention see at n scored positions each.

    Attributes:
        query, key: [R, heads, n, width] and [R, groups, S, width].
        mask: of all positions, as of `Heads`, for these rows; `where` are those of these, [R, n].
        last: of a causal attention without a mask, the last key that each position sees, [R, n].
    """

    rows: slice
    query: Tensor
    key: Tensor
    where: Tensor
    mask: Tensor | None
    last: Tensor | None
    scaling: float

    def weights(self) -> Tensor:
        """[R, heads, n, S], computed anew where it is read: kept until then, they would be most."""
        scores = _grouped(self.query, self.key.transpose(2, 3)).float() * self.scaling
        total = scores.shape[-1]
        if self.last is not None:
            later = torch.arange(total, device=scores.device) > self.last[:, None, :, None]
            scores = scores.masked_fill(later, -torch.inf)
        elif self.mask is not None:
            seen = _at(self.mask, self.where)[..., :total]
            boolean = seen.dtype == torch.bool
            scores = scores.masked_fill(~seen, -torch.inf) if boolean else scores + seen
        return scores.softmax(dim=-1).to(self.query.dtype)

    @property
    def flat(self) -> Tensor:
        """The queries in the order of `Scored.of`, [R * n, heads, width]."""
        return self.query.transpose(1, 2).flatten(0, 1)


class Heads:
    """One call of an attention.

    Args:
        module: the attention, which says whether it is causal where there is no mask.
        query, key, value: [B, heads, T or S, width]; key and value may have fewer heads.
        mask: [B or 1, 1 or heads, T or 1, S], added to the scores or True where a position is seen.
    """

    def __init__(
        self,
        scored: Scored,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float | None,
    ) -> None:
        self.scored, self.scaling = scored, scaling or query.shape[-1] ** -0.5
        self.heads, self.shared = query.shape[1], query.shape[1] // key.shape[1]
        self.query, self.key, self.value = query, key, value
        length, total = query.shape[2], key.shape[2]
        causal = mask is None and length > 1 and getattr(module, "is_causal", False)
        self.attended: list[Attended] = []
        for rows, positions in scored.chunks():
            where = _shifted(positions, length - scored.length)
            own = None if mask is None else mask.expand(len(query), -1, length, -1)[rows]
            last = _shifted(where, total - length) if causal else None
            picked = _at(query[rows], where)
            self.attended.append(Attended(rows, picked, key[rows], where, own, last, self.scaling))

    @cached_property
    def _weights(self) -> list[Tensor]:
        return [part.weights() for part in self.attended]

    def mix(self, x: Tensor) -> Tensor:
        """Sums over S with the weights of each scored position and head: [N, heads, c].

        Args:
            x: [B, S, c], or [B, heads, S, c]; it may have fewer heads.
        """
        x = x[:, None] if x.dim() == 3 else x
        sums = [_grouped(w, x[p.rows].to(p.query)) for w, p in zip(self._weights, self.attended)]
        return torch.cat([part.transpose(1, 2).flatten(0, 1) for part in sums])

    @property
    def outputs(self) -> Tensor:
        """The outputs of the heads at the scored positions, [N, heads, width]."""
        return self.mix(self.value)

    def of_values(self, module: Any, x: Tensor) -> Reading:
        """The gradients of a LoRA on the values, whose input is x [B, S, in].

        Where rows have one scored position, what is kept of x are its sums by head.
        """
        # What reads later must not hold more of this attention than it needs.
        heads, attended, shape = self.heads, self.attended, self.value.shape
        inputs = self.mix(x) if self.scored.single else x.flatten(0, 1)

        def read_alone(errors: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
            return lora_gradients(module, mixed, errors.unflatten(1, (heads, -1)), inputs)

        def read_several(errors: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
            own = torch.zeros(shape, device=errors.device)
            for part, e in _by_rows(errors, attended, heads):
                own[part.rows] = at_values(e, part.weights().float(), shape[1])
            own = own.transpose(1, 2).flatten(2).flatten(0, 1)
            return lora_gradients(module, low_rank, own, inputs)

        return read_alone if self.scored.single else read_several

    def _carry_to_queries(self) -> Callable[[Tensor], Tensor]:
        """Takes errors [N, heads * width] at the outputs of heads to queries [N, heads, width].

        Where a row has one scored position, what carries them is kept, else keys and values are.
        """
        attended, heads, scaling, value = self.attended, self.heads, self.scaling, self.value
        if self.scored.single:
            alone = self._weights[0][:, :, 0]
            carried = covariance(alone, self._repeated(self.key), self._repeated(value))
            return lambda errors: (
                scaling * (carried.float() @ errors.view(*carried.shape[:3], 1))[..., 0]
            )

        def carry(errors: Tensor) -> Tensor:
            found = [
                at_queries(e, p.weights().float(), p.key.float(), value[p.rows].float())
                for p, e in _by_rows(errors, attended, heads)
            ]
            return scaling * torch.cat([own.transpose(1, 2).flatten(0, 1) for own in found])

        return carry

    def of_queries(self, module: Any, x: Tensor, made: Tensor, scale: float | None) -> Reading:
        """The gradients of a LoRA on the queries, whose input and output are x and `made`.

        The attention sees `scale` times the output; None: each pair of it is also turned.
        """
        carry, inputs, heads = self._carry_to_queries(), self.scored.of(x), self.heads
        if scale is not None:
            return lambda errors: lora_gradients(
                module, low_rank, (scale * carry(errors)).flatten(1), inputs
            )
        before, attended = self.scored.of(made), self.attended

        def read(errors: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
            after = torch.cat([part.flat for part in attended]).float()
            own = unrotated(carry(errors), before.unflatten(1, (heads, -1)).float(), after)
            return lora_gradients(module, low_rank, own.flatten(1), inputs)

        return read

    def _repeated(self, x: Tensor) -> Tensor:
        """Keys or values of all heads, no copies where each has its own."""
        return x[:, :, None].expand(-1, -1, self.shared, -1, -1).flatten(1, 2)

    def of_prefix(self, model: PeftModel, layer: int) -> Reading:
        """The gradient of a prefix, whose keys and values stand in front of those of the tokens."""
        count = model.active_peft_config.num_virtual_tokens
        parameter = model.prompt_encoder[model.active_adapter].embedding.weight
        kept = [w[..., :count].transpose(1, 2).flatten(0, 1) for w in self._weights]
        weights, outputs = torch.cat(kept), self.outputs
        queries = torch.cat([part.flat for part in self.attended])
        values = self._repeated(self.value[:1, :, :count])[0].clone()
        heads, shared, scaling = self.heads, self.shared, self.scaling

        def read(errors: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
            own, w = errors.unflatten(1, (heads, -1)), weights.float()
            scores = torch.einsum("nhw,hpw->nhp", own, values.float())
            scores = scores - (own * outputs.float()).sum(dim=-1, keepdim=True)
            by_key = scaling * torch.einsum("nhp,nhw->phw", w * scores, queries.float())
            by_value = torch.einsum("nhp,nhw->phw", w, own)
            gradient = torch.zeros_like(parameter, dtype=torch.float32)
            places = gradient.view(count, -1, 2, heads // shared, own.shape[-1])
            for index, whole in enumerate((by_key, by_value)):
                places[:, layer, index] = whole.unflatten(1, (-1, shared)).sum(dim=2)
            return [(parameter, gradient)]

        return read


@dataclass
class Role:
    """What is known of an attention module, once it has been called.

    Attributes:
        agrees: its outputs are those of the weights that are computed here.
        value, query: the LoRAs that make its values and queries, if there are any.
        scale: what its queries are times the output of `query`; None where they are also turned.
        out: the linear module that its outputs go into.
    """

    agrees: bool
    value: nn.Module | None = None
    query: nn.Module | None = None
    scale: float | None = None
    out: nn.Module | None = None


def role_of(module: nn.Module, heads: Heads, output: Tensor, made: dict[nn.Module, Tensor]) -> Role:
    """Find the role of an attention.

    Args:
        output: of the attention, [B, T, heads, width].
        made: the outputs of the modules of its layer so far.
    """
    role = Role(_near(heads.outputs, heads.scored.of(output)))
    for candidate in filter(is_plain_lora, module.modules()):
        if (y := made.get(candidate)) is None or y.shape[-1] % heads.query.shape[-1]:
            continue
        y = y.unflatten(-1, (-1, heads.query.shape[-1])).transpose(1, 2)
        if y.shape == heads.value.shape and torch.equal(y, heads.value):
            role.value = candidate
        elif y.shape == heads.query.shape and _turned(y, heads.query):
            scale = float(heads.query.float().norm() / y.float().norm())
            # A single token is not turned, whatever the attention does with others.
            same = y.shape[2] > 1 and _near(scale * y, heads.query)
            role.query, role.scale = candidate, scale if same else None
    return role


def _shifted(positions: Tensor, by: int) -> Tensor:
    return positions + by if by else positions


def _at(x: Tensor, positions: Tensor) -> Tensor:
    """[R, heads, n, ...] of [R, heads, T, ...] at positions [R, n] of each row."""
    return x[torch.arange(len(x), device=x.device)[:, None], :, positions].transpose(1, 2)


def _grouped(x: Tensor, y: Tensor) -> Tensor:
    """The products [R, heads, n, c] of x [R, heads, n, S] and of y [R, groups, S, c].

    The heads of a group share a y.
    """
    _, heads, count, _ = x.shape
    shared = heads // y.shape[1]
    product = x.unflatten(1, (-1, shared)).flatten(2, 3) @ y
    return product.unflatten(2, (shared, count)).flatten(1, 2)


def _by_rows(
    errors: Tensor, attended: Sequence[Attended], heads: int
) -> Iterator[tuple[Attended, Tensor]]:
    """Parts of an attention, and the errors [R, heads, n, width] there of [N, heads * width]."""
    sizes = [part.where.numel() for part in attended]
    for part, own in zip(attended, errors.unflatten(1, (heads, -1)).split(sizes)):
        yield part, own.unflatten(0, (len(part.where), -1)).transpose(1, 2)


def lora_parameters(module: Any) -> list[nn.Parameter]:
    """A and B of a LoRA."""
    name = module.active_adapters[0]
    return [module.lora_A[name].weight, module.lora_B[name].weight]


def lora_gradients(
    module: Any, form: Callable[..., tuple[Tensor, Tensor]], errors: Tensor, inputs: Tensor
) -> list[tuple[nn.Parameter, Tensor]]:
    """The gradients of A and B of a LoRA; their closed form is `low_rank` or `mixed`."""
    return list(zip(lora_parameters(module), form(errors, inputs.float(), *lora_factors(module))))


def _turned(before: Tensor, after: Tensor) -> bool:
    """Whether queries are those before, each of their pairs turned and all scaled by one number."""
    sizes = [torch.complex(*x.float().chunk(2, dim=-1)).abs() for x in (before, after)]
    return _near(sizes[0] * (sizes[1].norm() / sizes[0].norm()), sizes[1])


def _near(x: Tensor, y: Tensor) -> bool:
    return torch.allclose(x.float(), y.float(), rtol=ROUNDING, atol=ROUNDING * float(y.abs().max()))
