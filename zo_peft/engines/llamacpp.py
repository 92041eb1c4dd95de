"""llama.cpp in this process: a GGUF base, through the C functions that `xllamacpp` exports.

Only functions that `llama.h` names are called. Structures change from build to build, so none is
declared here: batches are opaque (`llama_batch_ext`), and parameters that have to differ from the
defaults are found by their defaults, or the build is refused.
"""

import ctypes
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from ctypes import c_char_p, c_float, c_int32, c_size_t, c_void_p
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from zo_peft.engines.engine import Answers, Engine, Row, Sampling, States, answers, imported
from zo_peft.errors import UserError

#: The architectures of GGUF whose modules are known, and the modules whose rows a GGUF has in
#: another order: there the two halves that rotary embeddings turn are interleaved.
ARCHITECTURES = {"llama": r"\.[qk]_proj$", "qwen2": None, "qwen3": None}

#: Sequences that share a call, and tokens by which their space grows.
SEQUENCES, TOKENS = 8, 256

ADAPTER_NAME = "adapter.gguf"


class _Parameters(ctypes.Structure):
    """The parameters of a model or a context: more bytes than any build has."""

    _fields_ = (("words", c_int32 * 128),)


class _Pointer(ctypes.c_void_p):
    """To something of llama.cpp; unlike a plain `c_void_p` it is passed on as a pointer again."""


#: The functions whose results are no integers, by the type of the result.
RESULTS: dict[Any, str] = {
    _Parameters: "llama_model_default_params llama_context_default_params",
    _Pointer: "llama_model_load_from_file llama_model_get_vocab llama_init_from_model "
    "llama_get_memory llama_adapter_lora_init llama_batch_ext_init",
    ctypes.c_bool: "llama_batch_ext_set_pos llama_batch_ext_set_output_logits",
    ctypes.POINTER(c_float): "llama_get_logits_ith",
    c_char_p: "llama_print_system_info",
}

#: The number of a sequence, the position of the first of these tokens, and the positions whose next
#: tokens are asked about.
_Part = tuple[int, int, list[int], list[int]]


@ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
def _log(level: int, text: bytes, _: Any) -> None:
    """Passes on errors alone, which have this level."""
    if level == 4:
        sys.stderr.write(text.decode(errors="replace"))


class LlamaCpp(Engine):
    """llama.cpp on the CPU.

    On a base in float32, attention is float32, too. On others it is what llama.cpp takes by itself,
    which is faster: flash attention, with keys and values in float16.

    A state of an adapter goes to it as a GGUF file that exists in memory alone (Linux).

    Args:
        path: the GGUF file of the base.
        config: the configuration of the model that was converted.

    Raises:
        UserError: a package is missing or of another kind, or the file cannot be loaded.
    """

    def __init__(self, path: Path, config: PreTrainedConfig) -> None:
        xllamacpp, gguf = imported("xllamacpp", "gguf")
        self._library = library = _library(xllamacpp)
        self._gguf = gguf
        try:
            file = gguf.GGUFReader(path)
        except ValueError as error:
            raise UserError(f"{path} is no GGUF file: {error}") from error
        types = {tensor.tensor_type.name for tensor in file.tensors if len(tensor.shape) > 1}
        super().__init__("llamacpp", [path], types)
        self._architecture = file.get_field("general.architecture").contents()
        if self._architecture not in ARCHITECTURES:
            known = f"LoRA matrices are known to fit the GGUF files of {', '.join(ARCHITECTURES)}"
            raise UserError(f"{path} is a {self._architecture}; {known}")
        kind = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}[self._architecture]
        self._names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
        self._heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        parameters = library.llama_model_default_params()
        # On AVX2, k-quants are multiplied faster as the file has them than in the order that
        # llama.cpp would put them in; the switch for that is the only one that is on.
        if b"AVX2" in library.llama_print_system_info() and any(k.endswith("_K") for k in types):
            parameters.words[_place(parameters, 0, 1 << 16, 0) + 1] = 0
        self._model = library.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self._model:
            raise UserError(f"llama.cpp cannot load {path}; its reason stands above")
        self._context = self._batch = self._adapter = None
        self._length = 0
        #: The file of the adapter in memory, and its matrices by name as parts of it.
        self._file, self._views = os.memfd_create("adapter"), list[tuple[str, Any]]()
        self._tokens = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))
        own = [library.llama_model_n_layer(self._model), library.llama_model_n_embd(self._model)]
        told = [config.num_hidden_layers, config.hidden_size, config.vocab_size]
        if [*own, self._tokens] != told:
            raise UserError(
                f"{path} has {own[0]} layers of width {own[1]} and {self._tokens} tokens, and the "
                f"configuration {told[0]}, {told[1]} and {told[2]}; give the --tokenizer_name of "
                "the model that was converted"
            )

    def __del__(self) -> None:
        if getattr(self, "_model", None):
            self.forget()
            if self._adapter:
                self._library.llama_adapter_lora_free(self._adapter)
            self._library.llama_model_free(self._model)
            os.close(self._file)

    def answer(self, states: States, rows: Sequence[Sequence[Row]]) -> Answers:
        """As of `Engine`."""
        self._grow(max(len(row.ids) for own in rows for row in own))
        found = []
        for own in self._groups(states, rows):
            parts = [(number, 0, row.ids, row.positions) for number, row in enumerate(own)]
            found.append(answers(self._process(parts), own))
        return Answers(*map(torch.cat, zip(*found)))

    def generate(
        self, states: States, prompts: Sequence[Sequence[list[int]]], sampling: Sampling
    ) -> list[list[int]]:
        """As of `Engine`; keys and values are kept while a prompt is completed."""
        self._grow(max(len(ids) for own in prompts for ids in own) + sampling.longest)
        found = list[list[int]]()
        for own in self._groups(states, prompts):
            some = dict(enumerate(own, start=len(found)))
            found += sampling.complete(some, partial(self._next, some))
        return found

    def forget(self) -> None:
        """As of `Engine`: the space of sequences goes, and `answer` makes another."""
        if self._context:
            self._library.llama_batch_ext_free(self._batch)
            self._library.llama_free(self._context)
            self._context = None

    def save_adapter(self, states: States, folder: str) -> None:
        """As of `Engine`: `adapter.gguf`, as llama.cpp's own tools load it."""
        tensors = {name: tensor[0] for name, tensor in self._tensors(states).items()}
        self._write(Path(folder) / ADAPTER_NAME, tensors)

    # ---- Adapters -------------------------------------------------------------------------------

    def _tensors(self, states: States) -> dict[str, Any]:
        """The matrices of all states as a GGUF has them [M, ...], by name."""
        tensors, turned = {}, ARCHITECTURES[self._architecture]
        for module, (a, b) in states.items():
            name = self._names.get_name(module)
            if name is None:
                raise UserError(f"the GGUF has no place for a LoRA on {module}; name other modules")
            if turned and re.search(turned, module):
                heads = self._heads[module.rpartition(".")[2]]
                b = b.unflatten(1, (heads, 2, -1)).transpose(2, 3).flatten(1, 3)
            tensors[f"{name}.weight.lora_a"] = a.contiguous().numpy()
            tensors[f"{name}.weight.lora_b"] = b.contiguous().numpy()
        return tensors

    def _write(self, path: Path, tensors: dict[str, Any]) -> None:
        writer = self._gguf.GGUFWriter(path, self._architecture)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        # Then llama.cpp scales by 1: the scaling is in the matrices.
        writer.add_float32("adapter.lora.alpha", 0.0)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def _put(self, tensors: dict[str, Any]) -> None:
        """Put a state, as `_tensors` gives it, in the place of the last one."""
        library = self._library
        if not tensors:
            library.llama_set_adapters_lora(self._context, None, c_size_t(0), None)
            return
        path = Path(f"/proc/self/fd/{self._file}")
        if [(n, t.shape) for n, t in tensors.items()] != [(n, v.shape) for n, v in self._views]:
            self._write(path, tensors)
            found = self._gguf.GGUFReader(path, "r+").tensors
            self._views = [(tensor.name, tensor.data) for tensor in found]
        for name, view in self._views:
            view[...] = tensors[name]
        adapter = self.timed(library.llama_adapter_lora_init, self._model, os.fsencode(path))
        one, scale = c_size_t(1), ctypes.byref(c_float(1.0))
        if not adapter or library.llama_set_adapters_lora(
            self._context, ctypes.byref(adapter), one, scale
        ):
            raise UserError("llama.cpp refuses the adapter; its reason stands above")
        if self._adapter:
            library.llama_adapter_lora_free(self._adapter)
        self._adapter = adapter
        self.swaps += 1

    # ---- Questions ------------------------------------------------------------------------------

    def _grow(self, length: int) -> None:
        """Make space for sequences of so many tokens."""
        if self._context and length <= self._length:
            return
        self.forget()
        self._length = -(-length // TOKENS) * TOKENS
        library, flash = self._library, not self.is_float32
        parameters = _context_parameters(library, self._length, flash)
        self._context = context = library.llama_init_from_model(self._model, parameters)
        sizes = context and (library.llama_n_seq_max(context), library.llama_n_ctx_seq(context))
        if sizes != (SEQUENCES, self._length * (SEQUENCES if flash else 1)):
            what = f"llama.cpp does not give {SEQUENCES} sequences of {self._length} tokens each"
            raise UserError(f"{what}; shorten the examples (max_length)")
        library.llama_set_n_threads(context, torch.get_num_threads(), torch.get_num_threads())
        self._batch = library.llama_batch_ext_init(context)

    def _groups(self, states: States, rows: Sequence[Sequence[Any]]) -> Iterator[Sequence[Any]]:
        """A few rows at a time, for which their state is in its place and nothing is kept."""
        library, tensors = self._library, self._tensors(states)
        for index, own in enumerate(rows):
            self._put({name: tensor[index] for name, tensor in tensors.items()})
            for first in range(0, len(own), SEQUENCES):
                library.llama_memory_clear(library.llama_get_memory(self._context), False)
                yield own[first : first + SEQUENCES]

    def _next(self, prompts: dict[int, list[int]], drawn: dict[int, list[int]]) -> Tensor:
        """The logits behind what was drawn, of which all but the last tokens have been read."""
        parts = list[_Part]()
        for sequence, (number, prompt) in enumerate(prompts.items()):
            if number in drawn:
                new = drawn[number][-1:] or prompt
                last = len(prompt) + len(drawn[number]) - 1
                parts.append((sequence, last + 1 - len(new), new, [last]))
        return self._process(parts)

    def _process(self, parts: Iterable[_Part]) -> Tensor:
        """The logits [N, vocabulary] at the asked positions of these parts of sequences."""
        library, batch, places = self._library, self._batch, []
        library.llama_batch_ext_clear(batch)
        here = c_int32()
        for sequence, start, ids, positions in parts:
            asked = set(positions)
            for here.value, token in enumerate(ids, start):
                place = library.llama_batch_ext_add_token(batch, sequence, token)
                taken = library.llama_batch_ext_set_pos(batch, place, ctypes.byref(here))
                if here.value in asked:
                    taken &= library.llama_batch_ext_set_output_logits(batch, place, True)
                    places.append(place)
                if place < 0 or not taken:
                    raise UserError(f"llama.cpp does not take token {token} ({place})")
        # With 1 it decodes rather than encodes.
        if status := self.timed(library.llama_process, self._context, 1, batch):
            raise UserError(f"llama.cpp does not answer ({status}); its reason stands above")
        pointers = [library.llama_get_logits_ith(self._context, place) for place in places]
        logits = np.stack([np.ctypeslib.as_array(p, (self._tokens,)) for p in pointers])
        return torch.from_numpy(logits)


def _library(package: Any) -> ctypes.CDLL:
    """The functions of llama.cpp, or a UserError."""
    if sys.platform != "linux":
        raise UserError("llamacpp takes adapters from files in memory, as Linux has; use openvino")
    try:
        library = ctypes.CDLL(str(next(Path(package.__file__).parent.glob("xllamacpp*.so"))))
        for result, names in RESULTS.items():
            for name in names.split():
                getattr(library, name).restype = result
    except (StopIteration, OSError, AttributeError) as error:
        raise UserError(f"this xllamacpp lacks what is needed ({error}); upgrade it") from None
    library.llama_log_set(_log, None)
    library.llama_backend_init()
    return library


def _context_parameters(library: ctypes.CDLL, length: int, flash: bool) -> _Parameters:
    """Those of a context for `SEQUENCES` sequences of so many tokens.

    Flash attention is the last of four settings in a row that are -1 (automatic). The types of keys
    and values are the only two settings in a row that are 1 (float16). The last of six switches, of
    which four are on, lets sequences share a space: flash attention skips what they do not see.
    """
    parameters = library.llama_context_default_params()
    sizes, automatic = _place(parameters, 512, 2048, 512, 1), _place(parameters, -1, -1, -1, -1)
    types, switches = _place(parameters, 1, 1), _place(parameters, 0x01010100, 1)
    words = parameters.words
    words[sizes] = words[sizes + 1] = length * SEQUENCES
    words[sizes + 3], words[automatic + 3] = SEQUENCES, int(flash)
    if flash:
        words[switches + 1] |= 1 << 8
    else:
        words[types] = words[types + 1] = 0
    return parameters


def _place(parameters: _Parameters, *wanted: int) -> int:
    """Where these words stand in a row among the first ones, if that is one place alone."""
    words = parameters.words[:37]
    places = [n for n in range(36) if (*words[n : n + len(wanted)],) == wanted]
    if len(places) != 1:
        raise UserError("this xllamacpp has other parameters; install another version")
    return places[0]
