"""OpenVINO in this process: a base as optimum-intel exports it, and all candidates in one call.

The LoRA matrices are inputs of the graph, with one value for each candidate. The graph's last layer
sees the scored positions alone.
"""

import hashlib
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from zo_peft.engines.engine import Answers, Row, States
from zo_peft.errors import UserError

MODEL_NAME = "openvino_model.xml"

#: The inputs that a graph may have; one that keeps keys and values has others.
INPUTS = {"input_ids", "attention_mask", "position_ids"}


class OpenVino:
    """An `Engine`: OpenVINO on the CPU, with activations in float32.

    Args:
        folder: holds the graph (`openvino_model.xml` and `.bin`), exported without past.

    Raises:
        UserError: the package is missing, or the graph cannot be read or is of another kind.
    """

    def __init__(self, folder: str) -> None:
        if importlib.util.find_spec("openvino") is None:
            raise UserError("the engine openvino needs a package; pip install openvino")
        self._openvino: Any = importlib.import_module("openvino")
        path = Path(folder) / MODEL_NAME
        try:
            self._graph = self._openvino.Core().read_model(path)
        except RuntimeError as error:
            raise UserError(f"{path} cannot be read: {str(error).splitlines()[-1]}") from error
        self._inputs = [value.get_any_name() for value in self._graph.inputs]
        if strange := set(self._inputs) - INPUTS:
            raise UserError(
                f"{path} has the input {min(strange)}, because it keeps something of earlier tokens; "
                "export it with --task text-generation, which is without past"
            )
        nodes = self._graph.get_ops()
        self._products = {
            node.get_friendly_name().split("/")[0].removeprefix("__module."): node
            for node in nodes
            if node.get_type_name() == "MatMul"
        }
        stored = [n for n in nodes if n.get_type_name() == "Constant" and n.get_output_size() > 0]
        types = {n.get_element_type().get_type_name() for n in stored if len(n.shape) > 1}
        weights = types & {"f32", "f16", "bf16", "i8", "u8", "i4", "u4", "nf4"}
        self.is_float32 = weights <= {"f32"}
        digest = hashlib.blake2b(digest_size=16)
        for part in (path, path.with_suffix(".bin")):
            digest.update(part.read_bytes())
        loaded = f"openvino {', '.join(sorted(weights))}"
        self.identity = {"files": digest.hexdigest(), "loaded": loaded}
        self.swaps, self.seconds = 0, 0.0
        self._run: Any = None
        self._modules: list[str] = []

    def answer(self, states: States, rows: Sequence[Sequence[Row]]) -> Answers:
        """As of `Engine`."""
        if self._run is None:
            self._compile(list(states))
        flat = [row for own in rows for row in own]
        ids = pad_sequence([torch.tensor(row.ids) for row in flat], batch_first=True)
        lengths = torch.tensor([len(row.ids) for row in flat])
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        given = {
            "input_ids": ids,
            "attention_mask": (positions < lengths[:, None]).long(),
            "position_ids": positions,
        }
        places = [(index, place) for index, row in enumerate(flat) for place in row.positions]
        tensors = [*(given[name] for name in self._inputs), torch.tensor(places)]
        tensors += [matrix for module in self._modules for matrix in states[module]]
        start = time.perf_counter()
        logits = self._run([tensor.contiguous().numpy() for tensor in tensors])[0]
        self.seconds += time.perf_counter() - start
        self.swaps += len(rows)
        known = torch.from_numpy(logits).log_softmax(dim=-1)
        wanted = torch.cat([row.tokens for row in flat])
        return Answers(known.gather(1, wanted), known.argmax(dim=-1))

    def forget(self) -> None:
        """As of `Engine`; nothing is kept."""

    def save_adapter(self, states: States, folder: str) -> None:
        """As of `Engine`; OpenVINO GenAI loads PEFT's own file."""

    def _compile(self, modules: list[str]) -> None:
        """Put the LoRA matrices into the graph, and the scored places before its last layer."""
        openvino, graph = self._openvino, self._graph
        ops = openvino.opset13
        head = graph.output(0).get_node().input_value(0).get_node()
        places = ops.parameter([-1, 2], np.int64, "places")
        head.input(0).replace_source_output(ops.gather_nd(head.input_value(0), places).output(0))
        made = [places]
        for module in modules:
            product = self._products.get(module)
            if product is None or product is head:
                raise UserError(
                    f"the graph has no place for a LoRA on {module}; name other modules"
                )
            x, y, users = product.input_value(0), product.output(0), None
            users = y.get_target_inputs()
            a = ops.parameter([-1, -1, x.get_partial_shape()[2].get_length()], np.float32)
            b = ops.parameter([-1, y.get_partial_shape()[2].get_length(), -1], np.float32)
            lanes = ops.gather(ops.shape_of(a), np.array([0]), np.array(0))
            width = np.array([-1, x.get_partial_shape()[2].get_length()])
            split = ops.reshape(x, ops.concat([lanes, width], 0), False)
            low = ops.matmul(split, a, False, True)
            added = ops.reshape(ops.matmul(low, b, False, True), ops.shape_of(y), False)
            total = ops.add(y, added)
            for user in users:
                user.replace_source_output(total.output(0))
            made += [a, b]
        graph.add_parameters(made)
        graph.validate_nodes_and_infer_types()
        settings = {"INFERENCE_PRECISION_HINT": "f32"}
        settings["INFERENCE_NUM_THREADS"] = str(torch.get_num_threads())
        self._run, self._modules = openvino.Core().compile_model(graph, "CPU", settings), modules
