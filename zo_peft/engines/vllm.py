"""vLLM servers, here or elsewhere, in their OpenAI-compatible dialect of HTTP.

Each state of an adapter is written to a folder in PEFT's form, from which a server loads it for a
few prompts. Servers keep what they computed by the name and the folder of an adapter and by the
request's `cache_salt`, so none of these is ever used for two states.
"""

import itertools
import json
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from multiprocessing.pool import ThreadPool
from operator import methodcaller
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from zo_peft.core.noise import derive_seed
from zo_peft.engines.engine import Answers, Engine, Row, Sampling, States
from zo_peft.engines.servers import ServerFailure, Servers
from zo_peft.errors import UserError
from zo_peft.models.hub import httpx, public_name

#: Tasks that a server has at a time, each with an adapter of its own, and the prompts of a task.
AT_ONCE, PROMPTS = 16, 32

#: Tokens that a request may ask about, if a server has its default settings.
TOKENS = 20

#: By how many nats servers of the same base may differ.
SAME = 0.3

#: A prompt with the tokens whose log-probabilities are wanted behind it; and these by token, with
#: the likeliest token.
Place = tuple[list[int], list[int]]
Found = tuple[dict[int, float], int]

#: A prompt, and how its completion is drawn, in vLLM's words.
Prompt = tuple[list[int], dict[str, Any]]

T = TypeVar("T")


class _NotThereError(ServerFailure):
    """A server does not know an address or a model."""


class Server:
    """One vLLM server. Whatever it answers is checked.

    Args:
        url: such as `http://localhost:8000`.
        base: what the server calls the base.
        timeout: seconds that an answer may take.
    """

    def __init__(self, url: str, base: str, timeout: float) -> None:
        self._url, self._base = url.rstrip("/"), base
        key = os.environ.get("VLLM_API_KEY", "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError("VLLM_API_KEY has characters that no header may have; set it again")
        headers = {"Authorization": f"Bearer {key}"} if key else None
        # All prompts of all tasks go at once; that they wait for each other is no server's fault.
        limits = httpx.Limits(max_connections=None)
        self._client = httpx.Client(headers=headers, timeout=timeout, limits=limits)

    def __str__(self) -> str:
        return re.sub("//[^/@]*@", "//", self._url)

    def answer(self, path: Path | None, salt: str, places: Sequence[Place]) -> list[Found]:
        """The answers at some places, with the adapter in a folder or with none.

        A `ServerFailure` says that another server may answer, a UserError that none will.
        """
        return self._with(path, lambda model: self._ask(model, salt, places))

    def complete(self, path: Path | None, salt: str, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The completions of prompts, with an adapter or none; it raises what `answer` does."""
        return self._with(path, lambda model: self._draw(model, salt, prompts))

    def _with(self, path: Path | None, ask: Callable[[str], list[T]]) -> list[T]:
        if path is None:
            return ask(self._base)
        try:
            return self._with_adapter(path, ask)
        except _NotThereError:
            # The server has started again since it loaded the adapter.
            return self._with_adapter(path, ask)

    def _with_adapter(self, path: Path, ask: Callable[[str], list[T]]) -> list[T]:
        name = f"zo-peft-{secrets.token_hex(12)}"
        try:
            self._post("load_lora_adapter", lora_name=name, lora_path=str(path))
        except _NotThereError as error:
            start = "start it with --enable-lora and with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
            cure = f"{start}, and give an engine_folder that it sees"
            raise UserError(f"{self} does not load an adapter ({error}); {cure}") from None
        found = ask(name)
        self._post("unload_lora_adapter", lora_name=name)
        return found

    def _ask(self, model: str, salt: str, places: Sequence[Place]) -> list[Found]:
        found: list[Found] = [({}, -1)] * len(places)
        for indices, tokens in _requests(places):
            prompts = [places[index][0] for index in indices]
            # Without `prompt_logprobs`, which have ended whole servers that had a LoRA.
            body = {"max_tokens": 1, "temperature": 0, "repetition_penalty": 1, "cache_salt": salt}
            body |= {"logprobs": len(tokens), "logprob_token_ids": tokens}
            body["return_tokens_as_token_ids"] = True
            told = self._completions(model, prompts, partial(_known, tokens), **body)
            for index, (own, likeliest) in zip(indices, told):
                found[index] = found[index][0] | own, likeliest
        return found

    def _draw(self, model: str, salt: str, prompts: Sequence[Prompt]) -> list[list[int]]:
        """All at once, each in a request of its own, for a request has one seed."""

        def one(prompt: Prompt) -> list[int]:
            ids, body = prompt
            return self._completions(model, [ids], _drawn, cache_salt=salt, **body)[0]

        # A thread that hangs must not keep the process from ending, as those of an executor do.
        with ThreadPool(len(prompts)) as pool:
            return pool.map(one, prompts)

    def _completions(
        self,
        model: str,
        prompts: list[list[int]],
        read: Callable[[dict[str, Any]], T],
        **body: Any,
    ) -> list[T]:
        """What is read off the answer to each prompt, which must be of this model."""
        body |= {"model": model, "prompt": prompts, "return_token_ids": True}
        response = self._post("completions", **body)
        try:
            answer = response.json()
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            told = [answer["model"], *(choice["prompt_token_ids"] for choice in choices)]
            if told != [model, *prompts]:
                raise ServerFailure("it answers for another model, or other tokens")
            return [read(choice) for choice in choices]
        except (LookupError, TypeError, ValueError) as error:
            message = f"it does not answer as vLLM 0.32 does: {error!r}"
            raise ServerFailure(message) from None

    def _post(self, path: str, **body: Any) -> Any:
        """A response that tells no error."""
        try:
            response = self._client.post(f"{self._url}/v1/{path}", json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServerFailure(f"{type(error).__name__}: {error}") from None
        code, text = response.status_code, " ".join(response.text.split())[:300]
        told = f"HTTP {code} from /v1/{path}: {text}"
        if code == 404:
            raise _NotThereError(told)
        # Of these, what was asked is no reason.
        if code >= 500 or code in (408, 429):
            raise ServerFailure(told)
        if not response.is_success:
            raise UserError(f"{self} refuses a request: {told}")
        return response


class Vllm(Engine):
    """vLLM servers that share the candidates.

    No server tells which weights it has, so the journal knows the base by its name.

    Args:
        name: what the servers call the base.
        urls: of one server or several, all of that base.
        folder: where adapters are written for the servers, which see it at the same path; default:
            one in memory.
        timeout: seconds that an answer may take, and for which no server may answer.

    Raises:
        UserError: a server does not answer, or has another base.
    """

    def __init__(self, name: str, urls: Sequence[str], folder: str | None, timeout: float) -> None:
        super().__init__("vllm", [], [])
        self.identity = {"model": public_name(name), "loaded": "vllm"}
        if folder is not None and not Path(folder).is_dir():
            raise UserError(f"engine_folder={folder!r} is no folder; make it, or give another")
        in_memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
        self._folder = str(Path(folder).absolute()) if folder else in_memory
        servers = [Server(url, name, timeout) for url in urls]
        self._servers = Servers(servers, AT_ONCE, timeout)
        self.forget()
        tokens, first = [*range(TOKENS)], dict[int, float]()
        for server in servers:
            try:
                [(known, _)] = server.answer(None, next(self._salts), [(tokens, tokens)])
            except ServerFailure as error:
                cure = "mend that, or leave it out of engine_url"
                raise UserError(f"{server} does not answer ({error}); {cure}") from None
            first = first or known
            if not all(abs(known[token] - first[token]) <= SAME for token in tokens):
                what = f"{server} answers otherwise than {servers[0]}"
                raise UserError(f"{what}; give servers of one base")

    def forget(self) -> None:
        """As of `Engine`: no salt of earlier calls comes again."""
        self._salts = map(f"{secrets.token_hex(16)}-{{}}".format, itertools.count())

    def answer(self, states: States, rows: Sequence[Sequence[Row]]) -> Answers:
        """As of `Engine`."""
        places = [[*_places(own)] for own in rows]
        found = self._map(states, "answer", places)
        wanted = (tokens for own in places for _, tokens in own)
        known = [[own[token] for token in tokens] for (own, _), tokens in zip(found, wanted)]
        return Answers(torch.tensor(known), torch.tensor([likeliest for _, likeliest in found]))

    def generate(
        self, states: States, prompts: Sequence[Sequence[list[int]]], sampling: Sampling
    ) -> list[list[int]]:
        """As of `Engine`; with the seeds that it is given, vLLM draws all states alike."""
        numbers = itertools.count()
        asked = [[(ids, _settings(sampling, next(numbers))) for ids in own] for own in prompts]
        return self._map(states, "complete", asked)

    def _map(self, states: States, method: str, asked: Sequence[Sequence[Any]]) -> list[Any]:
        """What servers answer to what each state is asked, in its order."""
        tasks, path = [], None
        with tempfile.TemporaryDirectory(prefix="zo-peft-", dir=self._folder) as scratch:
            for index, own in enumerate(asked):
                if states:
                    path = Path(scratch, str(index))
                    _write(path, states, index)
                salt = next(self._salts)
                for start in range(0, len(own), PROMPTS):
                    tasks.append(methodcaller(method, path, salt, own[start : start + PROMPTS]))
            found = [*itertools.chain(*self.timed(self._servers.map, tasks))]
        self.swaps += len(asked) if states else 0
        return found


def _known(tokens: Sequence[int], choice: dict[str, Any]) -> Found:
    """The log-probabilities that a choice tells of these tokens, and the likeliest token."""
    told, (likeliest,) = choice["logprobs"]["top_logprobs"][0], choice["token_ids"]
    return {token: told[f"token_id:{token}"] for token in tokens}, likeliest


def _drawn(choice: dict[str, Any]) -> list[int]:
    """A completion, which has ended by itself or is as long as it may be."""
    if choice["finish_reason"] not in ("stop", "length"):
        raise ServerFailure(f"it ends a completion with {choice['finish_reason']!r}")
    return [int(token) for token in choice["token_ids"]]


def _settings(sampling: Sampling, number: int) -> dict[str, Any]:
    """How the completion of this prompt is drawn; what is not given may be the base's own."""
    body: dict[str, Any] = {"max_tokens": sampling.longest, "stop_token_ids": [*sampling.ends]}
    body |= {"ignore_eos": True, "repetition_penalty": 1, "top_k": -1, "min_p": 0, "temperature": 0}
    if noise := sampling.noise:
        seed = derive_seed(noise.seed, number % sampling.examples)
        body |= {"temperature": noise.temperature, "top_p": noise.top_p, "seed": seed}
    return body


def _places(rows: Iterable[Row]) -> Iterator[Place]:
    """A prompt for each place, which ends there, for a request tells what follows its end."""
    for row in rows:
        for position, tokens in zip(row.positions, row.tokens.tolist()):
            yield row.ids[: position + 1], tokens


def _requests(places: Sequence[Place]) -> Iterator[tuple[list[int], list[int]]]:
    """The indices of places that share a request, and the tokens of all of them."""
    indices, shared = dict[int, None](), set[int]()
    for index, (_, wanted) in enumerate(places):
        for token in wanted:
            if len(shared | {token}) > TOKENS:
                yield [*indices], sorted(shared)
                indices, shared = {}, set()
            indices[index] = None
            shared.add(token)
    yield [*indices], sorted(shared)


def _write(path: Path, states: States, index: int) -> None:
    """One of the states as PEFT saves an adapter; the scaling is in its matrices."""
    tensors = {}
    for module, (a, b) in states.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a[index].contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b[index].contiguous()
    rank = max(a.shape[1] for a, _ in states.values())
    config: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none"}
    config |= {"r": rank, "lora_alpha": rank, "target_modules": [*states]}
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(config))
    try:
        save_file(tensors, path / "adapter_model.safetensors")
    except SafetensorError as error:
        why = f"an adapter cannot be written to {path.parents[1]}: {error}"
        raise UserError(f"{why}; give an engine_folder with more space") from None
