"""OpenVINO in this process: a base as optimum-intel exports it, and all candidates in one call.

The LoRA matrices are inputs of the graph, with one value for each candidate. The graph's last layer
sees the scored positions alone.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from zo_peft.engines.engine import Answers, Engine, Row, Sampling, States, answers, imported
from zo_peft.errors import UserError

MODEL_NAME = "openvino_model.xml"

#: The inputs that a graph may have; one that keeps keys and values has others.
INPUTS = {"input_ids", "attention_mask", "position_ids"}

#: The types of weights; other constants are indices.
WEIGHTS = {"f32", "f16", "bf16", "i8", "u8", "i4", "u4", "nf4"}


@cache
def _core() -> Any:
    """The core of this process, which ends with it.

    OpenVINO gives the main thread a stack for signals. Where another thread ends the last core, the
    main thread keeps an address that is gone, and the next signal kills the process.
    """
    (openvino,) = imported("openvino")
    return openvino.Core()


class OpenVino(Engine):
    """OpenVINO on the CPU, with activations in float32.

    Args:
        folder: holds the graph (`openvino_model.xml` and `.bin`), exported without past.

    Raises:
        UserError: the package is missing, or the graph cannot be read or is of another kind.
    """

    def __init__(self, folder: Path) -> None:
        (self._openvino,) = imported("openvino")
        path = folder / MODEL_NAME
        try:
            self._graph = _core().read_model(path)
        except RuntimeError as error:
            raise UserError(f"{path} cannot be read: {str(error).splitlines()[-1]}") from error
        self._inputs = [value.get_any_name() for value in self._graph.inputs]
        if strange := set(self._inputs) - INPUTS:
            what = f"{path} has the input {min(strange)}, so it keeps something of earlier tokens"
            cure = "export it with --task text-generation, which is without past"
            raise UserError(f"{what}; {cure}")
        types = {
            node.get_element_type().get_type_name()
            for node in self._graph.get_ops()
            if node.get_type_name() == "Constant" and len(node.shape) > 1
        }
        super().__init__("openvino", [path, path.with_suffix(".bin")], types & WEIGHTS)
        self._run: Any = None
        #: The modules whose LoRA is in the graph that runs.
        self._modules: list[str] | None = None

    def answer(self, states: States, rows: Sequence[Sequence[Row]]) -> Answers:
        """As of `Engine`."""
        flat = [row for own in rows for row in own]
        places = [(index, place) for index, row in enumerate(flat) for place in row.positions]
        self.swaps += len(rows)
        return answers(self._logits(states, [row.ids for row in flat], places), flat)

    def generate(
        self, states: States, prompts: Sequence[Sequence[list[int]]], sampling: Sampling
    ) -> list[list[int]]:
        """As of `Engine`; every token is drawn by another run of the graph over all before it."""
        flat = [ids for own in prompts for ids in own]

        def ask(drawn: dict[int, list[int]]) -> Tensor:
            # Prompts that are complete stay, because each state has as many rows as any other.
            ids = [prompt + drawn.get(number, []) for number, prompt in enumerate(flat)]
            return self._logits(states, ids, [(number, len(ids[number]) - 1) for number in drawn])

        self.swaps += len(prompts)
        return sampling.complete(range(len(flat)), ask)

    def _logits(
        self, states: States, rows: Sequence[list[int]], places: Sequence[tuple[int, int]]
    ) -> Tensor:
        """The logits [N, vocabulary] at places (row, position) of rows that states have in turn."""
        if self._modules != [*states]:
            self._compile([*states])
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        given = {
            "input_ids": ids,
            "attention_mask": (positions < lengths[:, None]).long(),
            "position_ids": positions,
        }
        tensors = [*(given[name] for name in self._inputs), torch.tensor(places)]
        tensors += [matrix for module in states for matrix in states[module]]
        arrays = [tensor.contiguous().numpy() for tensor in tensors]
        return torch.from_numpy(self.timed(self._run, arrays)[0])

    def _compile(self, modules: list[str]) -> None:
        """Put the LoRA matrices into the graph, and the scored places before its last layer."""
        graph = self._graph.clone()
        # Products with weights, by the names of their modules.
        products = {
            node.get_friendly_name().split("/")[0].removeprefix("__module."): node
            for node in graph.get_ops()
            if node.get_type_name() == "MatMul"
        }
        ops = self._openvino.opset13
        head = graph.output(0).get_node().input_value(0).get_node()
        places = ops.parameter([-1, 2], np.int64)
        head.input(0).replace_source_output(ops.gather_nd(head.input_value(0), places).output(0))
        made = [places]
        for module in modules:
            product = products.get(module)
            if product is None or product is head or len(product.get_output_partial_shape(0)) != 3:
                raise UserError(f"the graph has no place for a LoRA on {module}; leave it out")
            x, y = product.input_value(0), product.output(0)
            users = y.get_target_inputs()
            width, out = (value.get_partial_shape()[2].get_length() for value in (x, y))
            a = ops.parameter([-1, -1, width], np.float32)
            b = ops.parameter([-1, out, -1], np.float32)
            count = ops.gather(ops.shape_of(a), np.array([0]), np.array(0))
            # One lane of all its rows for each state.
            lanes = ops.reshape(x, ops.concat([count, np.array([-1, width])], 0), False)
            added = ops.matmul(ops.matmul(lanes, a, False, True), b, False, True)
            total = ops.add(y, ops.reshape(added, ops.shape_of(y), False))
            for user in users:
                user.replace_source_output(total.output(0))
            made += [a, b]
        graph.add_parameters(made)
        graph.validate_nodes_and_infer_types()
        settings = {"INFERENCE_PRECISION_HINT": "f32"}
        settings["INFERENCE_NUM_THREADS"] = str(torch.get_num_threads())
        self._run, self._modules = _core().compile_model(graph, "CPU", settings), modules
