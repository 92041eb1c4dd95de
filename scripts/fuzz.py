"""Mutated journals, configurations, data files, rows and settings: used, or refused by `UserError`.

Anything else is a finding: another exception, an input that takes more than a second of processor
time (settings, with which a run is made: 20), a file that is opened for writing outside the scratch
folder, a process, a connection, or a pickle. Findings are printed with their input, and the exit
code is 1 if there is any.

    python scripts/fuzz.py --inputs 100000
"""

import argparse
import contextlib
import copy
import csv
import io
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    TrainerCallback,
)

from zo_peft import Direction, UserError, ZOConfig, ZOTrainer
from zo_peft.cli import RUN as NAMES
from zo_peft.cli import named
from zo_peft.core.journal import MAGIC, Record, framed, read
from zo_peft.data import Collator, Tokenization, make_examples, read_rows, tokenize_dataset
from zo_peft.runs.arguments import DataArguments
from zo_peft.runs.options import parse
from zo_peft.runs.sources import training_examples
from zo_peft.tools.demo import EMBEDDED
from zo_peft.train.answers import questions

CONFIG = b"""model_name_or_path: facebook/opt-125m
train_file: train.tsv
label_words: "terrible,great"
lora_target_modules: [q_proj, v_proj]
learning_rate: 1e-3
num_candidates: 8
max_forward_passes: 2000
per_device_train_batch_size: 16
load_in_8bit: true
strategy: gv
zo_eps: null
output_dir: out
"""
DATA = {
    ".jsonl": b'{"text": "a fine film", "label": 1, "n": [1.5]}\n{"text": "dull", "label": 0}\n',
    ".csv": b'text,label\n"a fine, warm film",1\ndull,0\n',
    ".tsv": b'text\tlabel\na fine "film"\t1\ndull\t0\n',
    "_semicolons.csv": b'text;label\n"a fine; warm film";1\n"""dull"", they said";0\n',
    "_tabs.csv": 'text\tlabel\n"a caf\xe9, warm"\t1\ndull\t0\n'.encode("utf-16"),
    "_quoted.tsv": b'text\tlabel\n"a fine\nwarm film"\t1\ndull\t0\n',
    "_cp1252.csv": b'text,label\n"a caf\xe9 \x96 it\x92s warm",1\ndull,0\n',
    "_cp1252.json": b'[{"text": "a caf\xe9", "label": 1}, {"text": "dull", "label": 0}]',
}
TURN = {"role": "user", "content": "Was it good?"}
ANSWER = {"role": "assistant", "content": "It was great"}
CALL = {"role": "assistant", "tool_calls": [{"name": "look", "arguments": {"where": "here"}}]}
SHARED = [{"from": "human", "value": "Was it good?"}, {"from": "gpt", "value": "It was great"}]
#: A row of each form, with what may stand beside its columns.
ROWS: list[dict[str, Any]] = [
    {"prompt": "It was", "completion": "great", "passage": "It", "id": 1},
    {"prompt": [TURN], "completion": [ANSWER], "tools": [{"name": "look"}]},
    {"prompt": "It was", "options": ["bad", "great"], "label": 1, "also_right": [0]},
    {"prompt": "Who?", "answers": ["I", "me"]},
    {"messages": [TURN, {**ANSWER, "weight": 0}, TURN, {**CALL, "weight": 1}], "tools": "[{}]"},
    {"text": "a fine film", "label": 1},
    {"text": "a fine film", "category": "b"},
    {"input_ids": [5, 6, 0], "labels": [-100, 6, -100], "attention_mask": [1, 1, 0]},
    {"input_ids": [5, 6], "labels": 1, "token_type_ids": [0, 0]},
    {"conversations": [*SHARED, *SHARED], "tools": [{"name": "look"}]},
    {"conversations": [TURN, ANSWER, *SHARED[:1]]},
    {"instruction": "Say it", "input": "It was", "output": "great"},
    {"instruction": "Say it", "context": "It was", "response": "great"},
    {"prompt": "It was", "response": "great"},
]
#: What stands in place of a value of a row.
ODD: list[Any] = [None, True, False, 0, 1, -1, 2, 1.0, 0.5, float("nan"), 10**30, "", " ", "1"]
ODD += ["great", "<eos>", "<bos>", "\ud800", "{text}", [], [[]], ["a"], [1], [0, 1], [None], {}]
ODD += [{"role": "user"}, [TURN], [ANSWER], [TURN, ANSWER], [TURN, CALL], "[]", "[1]", "{", [{}]]
ODD += [{"from": "gpt"}, SHARED, SHARED[:1], [*SHARED, {"from": "system", "content": "It"}]]
ODD += ['a caf\xe9 \u2013 it\u2019s; "warm"\n']
ODD += [10**6, ["a", "a"], ["a", ["b"]], "It was", [TURN, {**ANSWER, "x": 1}], [5, 6, 0, 7]]
#: What mutations insert.
PIECES = [b"", b"\0", b"\xff", b"\n", b"{", b"}", b"[", b"]", b'"', b":", b"- ", b"&a", b"*a"]
PIECES += [b"!!", b"null", b"true", b"nan", b"1e999", b"-1", b"../../etc/x", b"9" * 40]
PIECES += [b"[" * 2000, b"!!python/object/apply:os.system [id]", b"\xf0\x9f\x98\x80", b",", b"\t"]
PIECES += [b"%s", b"'"]
FORBIDDEN = ("subprocess.Popen", "os.system", "socket.connect", "pickle.find_class")


TOKENIZER = AutoTokenizer.from_pretrained(EMBEDDED / "model")
TOKENIZER.chat_template = (
    "{{ tools }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ m.tool_calls }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


class Hang(Exception):
    """An input that takes too long."""


def mutated(content: bytes, random_: random.Random) -> bytes:
    """The content with one to six random changes."""
    data = bytearray(content)
    for _ in range(random_.randint(1, 6)):
        place = random_.randrange(len(data) + 1)
        stop = min(len(data), place + random_.choice((0, 1, 1, 4, 40)))
        kind = random_.randrange(4)
        if kind == 0:
            data[place:stop] = random_.choice(PIECES)
        elif kind == 1:
            data[place:stop] = random_.randbytes(stop - place)
        elif kind == 2:
            data[place:place] = data[place:stop] * random_.randint(1, 3)
        elif place < len(data):
            data[place] ^= 1 << random_.randrange(8)
    return bytes(data)


#: Options of `zo-peft train`, and what a YAML file may say of one.
RUN = [*map(named, NAMES)]
OPTIONS = [f.name for arguments in RUN for f in fields(arguments) if f.init]
VALUES = (
    b"null;true;word;'';-1;0;1.5;1e400;.nan;.inf;0x10;9999999999999999999;2020-01-01;!!binary aGk=;"
    b"[];[1, 2];[null];[[x]];&a [*a];{a: 1};{1: [2]};!!set {a};'{\"a\": 1}'"
).split(b";")


def mutated_config(content: bytes, random_: random.Random) -> bytes:
    """A changed configuration; half of them are well-formed, with one to three more options."""
    if random_.random() < 0.5:
        return mutated(content, random_)
    for option in random_.sample(OPTIONS, random_.randint(1, 3)):
        content += option.encode() + b": " + random_.choice(VALUES) + b"\n"
    return content


HEADER = b'{"space": {"tune": "adapter"}}'


def records() -> list[bytes]:
    """The contents of a journal's frames behind its header."""
    direction = Direction(((3, 0.5), (9, -0.5)))
    made = [Record(n, 0.1, 1.0, 0.2, 0.3, 0.4, 0.5, 0.01, 4, 64, direction) for n in range(2)]
    chosen = Record(2, 0.1, 1.0, 0.2, 0.3, 0.4, 0.5, 0.01, 4, 64, direction, 3, 0, {"skipped": ""})
    return [record.pack() for record in (*made, chosen)]


def mutated_journal(content: bytes, random_: random.Random) -> bytes:
    """A changed journal; half of them have right checksums, so that their frames are read."""
    if random_.random() < 0.5:
        return mutated(content, random_)
    frames = [HEADER, *records()]
    place = random_.randrange(len(frames))
    frames[place] = mutated(frames[place], random_)
    return MAGIC + b"".join(map(framed, frames))


def mutated_rows(content: bytes, random_: random.Random) -> bytes:
    """One to three rows, most often of one form, with values that are replaced, moved or gone."""
    forms = random_.choices(ROWS, k=3)
    rows = [copy.deepcopy(forms[0 if random_.random() < 0.8 else n]) for n in range(3)]
    for _ in range(random_.randint(1, 4)):
        place: Any = random_.choice(rows)
        key = random_.choice([*place])
        while isinstance(place[key], dict | list) and place[key] and random_.random() < 0.6:
            place = place[key]
            key = random_.choice([*place] if isinstance(place, dict) else range(len(place)))
        value = copy.deepcopy(random_.choice(ODD))
        if random_.random() < 0.2 and len(place) > 1:
            del place[key]
        elif isinstance(place, dict) and random_.random() < 0.2:
            place[random_.choice([key for row in ROWS for key in row])] = value
        else:
            place[key] = value
    settings = random_.randrange(2**16)
    return json.dumps([settings, rows[: random_.randint(1, 3)]]).encode()


#: Fields of `ZOConfig` that act on the process, another machine or folder, or take minutes.
ELSEWHERE = r"hub|tf32|compile|determinism|ddp|fsdp|deepspeed|trackio|report|dir$|workers|rank$|jit"
SETTINGS = {f.name: f.default for f in fields(ZOConfig) if not re.search(ELSEWHERE, f.name)}
#: What stands in place of a value of the settings, and of an option of an adapter.
ODD_SETTINGS = [
    *ODD[:16],
    -0.5,
    4,
    1e-3,
    float("inf"),
    "no",
    "epoch",
    "steps",
    "gv",
    "mezo",
    "adam",
]
ODD_SETTINGS += ["guided", "accuracy", "f1", "normalized", "sgd", "central", "split", "lozo", "all"]
ODD_SETTINGS += ["q_proj", ["q_proj"], ["embed_tokens"], "all-linear", "lora_B", "(", {"a": 1}, [4]]
ADAPTERS = ["LORA", "LORA", "IA3", "PREFIX_TUNING", "PROMPT_TUNING", "VERA", "LN_TUNING", "OFT"]


def mutated_settings(content: bytes, random_: random.Random) -> bytes:
    """Settings of a trainer, options of an adapter and arguments of `ZOTrainer`, some odd."""
    kind = random_.choice(ADAPTERS)
    adapter = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    options = {f.name: f.default for f in fields(adapter) if not re.search(ELSEWHERE, f.name)}
    drawn: list[Any] = [random_.randrange(2**8), kind]
    for known, most in ((SETTINGS, 4), (options, 2), (dict.fromkeys(ARGUMENTS), 1)):
        chosen = random_.sample([*known], random_.randint(0, most))
        drawn.append({name: odd_setting(known[name], random_) for name in chosen})
    return json.dumps(drawn).encode()


def odd_setting(default: Any, random_: random.Random) -> Any:
    """Most often a value of the default's type."""
    alike = [value for value in ODD_SETTINGS if type(value) is type(default)]
    return random_.choice(alike if len(alike) > 1 and random_.random() < 0.8 else ODD_SETTINGS)


MUTATIONS = {
    "journal": mutated_journal,
    "config": mutated_config,
    "rows": mutated_rows,
    "settings": mutated_settings,
}


def read_journal(path: Path) -> None:
    """Read a journal to its end."""
    for _ in read(path)[1]:
        pass


def read_config(path: Path) -> None:
    """Read a configuration as `zo-peft train --config` does."""
    parse("train", RUN, ["--config", str(path)])


def read_data(path: Path) -> None:
    """Read training data, with a template and label words, and for a head for classes."""
    make_examples(read_rows(path), path.name, "{text} It was", label_words=["terrible", "great"])
    make_examples(read_rows(path), path.name, classifies=True)


TEMPLATES = [None, "{text} It was", "{prompt}", "{id}{text}", "{}", "{{text}}", "{ text }"]
WORDS = [None, ["terrible", "great"], ["1", "0"], ["yes", "no"], ["auto"], ["none"], ["0=b", "1=c"]]
#: How rows are written: suffix, encoding, and what separates columns (none: JSON lines).
FILES = [(".jsonl", "utf-8", ""), (".jsonl", "cp1252", ""), (".csv", "utf-8", ",")]
FILES += [(".csv", "cp1252", ";"), (".csv", "utf-16", "\t"), (".tsv", "cp1252", "\t")]


def written(rows: list[dict[str, Any]], folder: Path, choices: random.Random) -> Path:
    """A file of the rows, of one of the kinds that people have."""
    suffix, encoding, delimiter = choices.choice(FILES)
    text = io.StringIO(newline="")
    if delimiter:
        names = dict.fromkeys(name for row in rows for name in row)
        table = csv.DictWriter(text, names, delimiter=delimiter)
        table.writeheader()
        table.writerows(rows)
    else:
        text.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path = folder / f"rows{suffix}"
    path.write_bytes(text.getvalue().encode(encoding, "replace"))
    return path


def read_mutated_rows(path: Path) -> None:
    """Make a batch of rows: of a list, of a `Dataset`, or of a file with a template and words.

    The batch is one to train on, or one of questions to answer.
    """
    choice, rows = json.loads(path.read_bytes())
    choices = random.Random(choice)
    heads, generates = choices.choice([(None, False), (None, False), (2, False), (None, True)])
    # Some rows are too long for these.
    context, max_length = choices.choice([None, 12]), choices.choice([None, 4, 8])
    tokenization = Tokenization(
        TOKENIZER, context, max_length, heads, generates, vocabulary=len(TOKENIZER)
    )
    kind = choices.randrange(4)
    data: Any = rows
    if kind == 0:
        given = choices.choice(TEMPLATES), choices.choice([None, "label", "category"])
        file = str(written(rows, path.parent, choices))
        asked = DataArguments(
            train_file=file,
            prompt_template=given[0],
            label_column=given[1],
            label_words=choices.choice(WORDS),
        )
        with contextlib.redirect_stderr(io.StringIO()):
            data, _ = training_examples(asked, heads is not None, generates, seed=0)
    elif kind == 1:
        try:
            data = Dataset.from_list(rows)
        except (ValueError, TypeError, OverflowError):
            return
        data = data.with_format(choices.choice([None, "torch"]))
        data = choices.choice([data, data.to_iterable_dataset()])
    if choices.random() < 0.3 and (found := questions(data, tokenization)):
        has_labels = heads is not None or "options" in found[0]
        data, tokenization = found, replace(tokenization, generates=not has_labels)
    features = tokenize_dataset(data, tokenization)
    Collator(0)(list(features))


SIZES = {"vocab_size": len(TOKENIZER), "hidden_size": 16, "intermediate_size": 16}
SIZES |= {"num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0}
LANGUAGE = LlamaForCausalLM(LlamaConfig(**SIZES))
CLASSIFIER = LlamaForSequenceClassification(LlamaConfig(**SIZES))
TRAINED = {"CAUSAL_LM": ROWS[2], "SEQ_CLS": ROWS[5]}
#: Arguments of `ZOTrainer` that are odd where they are given at all.
ARGUMENTS = ["train_dataset", "eval_dataset", "peft_config", "args"]


class Stops(TrainerCallback):
    """Ends a run after its second step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As in transformers."""
        control.should_training_stop |= state.global_step >= 2


def train(path: Path) -> None:
    """Make the settings; one in 16 is tried in two steps of a tiny model, and its adapter saved."""
    choice, kind, settings, options, given = json.loads(path.read_bytes())
    short = {"max_steps": 2, "logging_steps": 1, "disable_tqdm": True, "use_cpu": True}
    config = ZOConfig(str(path.parent / "out"), **{**short, **settings})
    if choice % 16:
        return
    task = ("CAUSAL_LM", "SEQ_CLS")[choice // 16 % 2]
    base = copy.deepcopy(LANGUAGE if task == "CAUSAL_LM" else CLASSIFIER)
    try:
        adapter = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)](**{"task_type": task, **options})
    except Exception:  # PEFT itself refuses the options
        return
    rows = [TRAINED[task]] * 3
    usual = {"args": config, "train_dataset": rows, "eval_dataset": rows, "peft_config": adapter}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        trainer = ZOTrainer(base, processing_class=copy.deepcopy(TOKENIZER), **{**usual, **given})
        trainer.add_callback(Stops)
        trainer.train()
        if trainer.eval_dataset is not None:
            trainer.evaluate()
        trainer.save_model()


Parser = Callable[[Path], None]


def fuzz(
    name: str, parser: Parser, seeds: dict[str, bytes], folder: Path, inputs: int, seed: int
) -> set[str]:
    """Give a parser so many mutated inputs; prints one input for each kind of error, if any.

    Returns:
        The kinds of errors.
    """
    random_, outcomes, found = random.Random(seed), Counter[str](), set[str]()
    start = time.monotonic()
    for number in range(inputs):
        suffix, content = list(seeds.items())[number % len(seeds)]
        data = MUTATIONS.get(name, mutated)(content, random_)
        path = folder / f"input{suffix}"
        path.write_bytes(data)
        signal.setitimer(signal.ITIMER_PROF, 20.0 if name == "settings" else 1.0)
        try:
            parser(path)
            outcomes["read"] += 1
        except UserError:
            outcomes["refused"] += 1
        except Exception as error:
            outcomes["findings"] += 1
            kind = f"{name}: {type(error).__name__}: {str(error)[:80]}"
            if kind not in found:
                print(f"{kind}\n    {data!r}", flush=True)
            found.add(kind)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    counts = ", ".join(f"{count:,} {outcome}" for outcome, count in outcomes.items())
    print(f"{name}: {inputs:,} inputs in {time.monotonic() - start:.0f} s: {counts}", flush=True)
    return found


def _guard(folder: Path) -> None:
    """Have everything that no parser may do raise an error."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FORBIDDEN:
            raise PermissionError(event)
        if event == "open":
            path, _, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            path = Path(path).absolute() if isinstance(path, str) else folder
            if writes and not path.is_relative_to(folder):
                raise PermissionError(f"{path} is opened for writing")

    def late(*_: Any) -> None:
        raise Hang("too long")

    signal.signal(signal.SIGPROF, late)
    sys.addaudithook(hook)


def main() -> int:
    """Print how inputs were taken; returns 1 if there is a finding."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", type=int, default=100_000, help="for each parser")
    kinds = ["journal", "config", "data", "rows", "settings"]
    parser.add_argument("--parsers", nargs="*", default=kinds)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    datasets.disable_caching()
    # The hash of its content is half of the time that a small data set takes, and names a cache.
    datasets.arrow_dataset.generate_fingerprint = lambda _: "none"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        # Where a run is given no folder, it makes one here.
        os.chdir(folder)
        parsers: dict[str, tuple[Parser, dict[str, bytes]]] = {
            "journal": (read_journal, {"": MAGIC + b"".join(map(framed, [HEADER, *records()]))}),
            "config": (read_config, {".yaml": CONFIG}),
            "data": (read_data, DATA),
            "rows": (read_mutated_rows, {".jsonl": b""}),
            "settings": (train, {".json": b""}),
        }
        _guard(folder)
        findings = set[str]()
        for name in given.parsers:
            read_one, seeds = parsers[name]
            findings |= fuzz(name, read_one, seeds, folder, given.inputs, given.seed)
        print(f"{len(findings)} findings" if findings else "no findings")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
