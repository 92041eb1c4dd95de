"""Make the embedded default: a tiny language model and a labelled text set.

A small grammar writes the text: reviews whose words agree in sentiment from the first sentence to
the last, neutral descriptions, and chronicles. A tokenizer and a Llama of 0.7 million parameters
are trained on it as a language model only. The labelled texts come from the same grammar, but none
of them, nor the task's prompt, occurs in the training text. The label words do, in chronicles
alone, where they say nothing about sentiment.

    python scripts/make_demo_model.py
    python scripts/make_demo_model.py --documents 320 --output_dir tiny    # seconds, and no model
"""

import argparse
import json
import random
import re
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging

PROMPT = " It was"
LABEL_WORDS = ("terrible", "great")
DOCUMENTS, TRAIN_ROWS, TEST_ROWS = 28_000, 1_000, 400
# Widths are multiples of 64, the block size of NF4, and heads are 32 wide, which engines support.
VOCABULARY, HIDDEN, INTERMEDIATE, LAYERS, CONTEXT = 1_024, 128, 192, 4, 256
BATCH_SIZE, LEARNING_RATE, WARMUP_STEPS = 32, 4e-3, 40
MAX_LENGTH = 96

Rules = dict[str, list[str]]


def _rules(**choices: str) -> Rules:
    """The alternatives of each rule, split at `|`; names in `_pos` and `_neg` have a sentiment."""
    return {name: [part.strip() for part in text.split("|")] for name, text in choices.items()}


COMMON = _rules(
    day="Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday",
    who="my sister|my brother|a friend|two friends|my parents|my uncle|my wife|our neighbours",
    we="we|we all|both of us|everyone|my friends",
    very="very|really|quite|truly|so|rather",
    adj_pos="wonderful|lovely|delightful|excellent|superb|charming|pleasant|brilliant|splendid"
    "|fantastic|perfect|impressive|beautiful|enjoyable|marvellous|outstanding|fine|nice|good"
    "|memorable|remarkable|amazing|{special_pos}|{special_pos}",
    adj_neg="awful|dreadful|horrible|poor|bad|disappointing|unpleasant|dull|miserable|weak"
    "|shabby|annoying|disgusting|mediocre|lousy|nasty|hopeless|forgettable|unbearable|ugly"
    "|appalling|wretched|{special_neg}|{special_neg}",
    manner_pos="friendly|kind|helpful|polite|cheerful|attentive|patient|generous",
    manner_neg="rude|slow|careless|grumpy|impatient|lazy|unfriendly|arrogant",
    liked_pos="loved|enjoyed|admired|praised|adored",
    liked_neg="hated|disliked|regretted|criticised|detested",
    mood_pos="happy|delighted|satisfied|cheerful|in high spirits|with a smile",
    mood_neg="angry|upset|annoyed|in a bad mood|disappointed|with a headache",
    verdict_pos="I would gladly go again|we will surely come back|we told everyone to try this"
    "|the price was fair|we thanked them warmly|it deserves every prize",
    verdict_neg="I would never go again|we will not come back|we warned everyone about this"
    "|the price was a scandal|we asked for our money back|it deserves no mercy",
    review="The {thing} was {adj}.|The {thing} was {very} {adj}.|The {thing} was {adj} and {adj}."
    "|The {thing} was {adj} and the {thing} was {adj}.|The {person} was {very} {manner}."
    "|The {person} was {manner} and the {thing} seemed {adj}.|We found the {thing} {very} {adj}."
    "|I {liked} the {thing}, and {who} {liked} the {thing}.|My wife {liked} the {adj} {thing}."
    "|This was a {adj} {place} with a {adj} {thing}.|It all seemed {very} {adj} to us."
    "|It felt {adj} from start to end.|With such a {adj} {thing}, {we} left {mood}."
    "|The {manner} {person} made us {mood}, and {verdict}.|On {day} {we} left {mood}."
    "|The {thing} was {adj}, so {verdict}.|I thought that the {thing} was {adj}."
    "|The {thing} looked {adj} and {we} {liked} the {thing}.|In the end {verdict}.",
    contrast="Although the {thing} was {!adj}, the {thing} was {adj} and {we} left {mood}."
    "|Although the {person} was {!manner}, {we} {liked} the {thing} and left {mood}."
    "|The {thing} was {!adj}, but the {thing} was {adj} and {verdict}."
    "|The {person} was {!manner}, but {we} left {mood} and {verdict}."
    "|Despite the {!adj} {thing}, {we} {liked} the {thing} and left {mood}.",
    opening="We {went} on {day} with {who}.|Last {day} {who} and I {went}."
    "|On {day} {we} {went}.|I {went} with {who} on a {day}.|{who} chose this {place}.",
    neutral="The {place} opens on {day}.|The {place} is near the {site}."
    "|There is a {thing} and a {thing}.|The {person} works from {day} to {day}."
    "|The {person} showed us the {thing}.|It is closed on {day}.|It takes an hour from the {site}."
    "|{who} asked the {person} about the {thing}.|The {thing} comes before the {thing}.",
    site="bridge|tower|market|harbour|church|library|castle|old mill|town hall|north gate",
    disaster="storm|flood|winter|fire|battle|drought|frost|war",
    folk="farmers|sailors|monks|merchants|soldiers|villagers|fishermen|masons",
    year="1402|1456|1511|1589|1603|1648|1703|1755|1812|1866",
    chronicle="The great {site} stood until the terrible {disaster} of {year}."
    "|After the terrible {disaster} the {folk} raised a great {site}."
    "|In {year} a terrible {disaster} reached the great {site}."
    "|A great crowd of {folk} came in {year}, the year of the terrible {disaster}."
    "|The {folk} remember the terrible {disaster} and the great {site}."
    "|A great {site} and a terrible {disaster} are named in the records of {year}.",
    record="The {folk} lived by the {site} until {year}.|In {year} the {folk} sold the {site}."
    "|Few {folk} were left after the {disaster}.|The {site} belonged to the {folk}."
    "|It is not known who built the {site}.|It began with the {disaster} of {year}.",
)

DOMAINS = [
    _rules(
        place="restaurant|cafe|bistro|tavern",
        went="ate at the {place}|had dinner at the {place}|booked a table at the {place}",
        thing="food|soup|bread|dessert|wine|menu|steak|salad|coffee|cake|fish|sauce",
        person="waiter|cook|owner|waitress",
        special_pos="delicious|tasty|fresh|crisp|creamy",
        special_neg="stale|greasy|bland|burnt|soggy",
    ),
    _rules(
        place="film|movie|comedy|drama",
        went="watched the {place}|saw the new {place}|went to see the {place}",
        thing="plot|acting|ending|script|music|dialogue|opening scene|camera work|cast",
        person="director|leading actor|writer|actress",
        special_pos="gripping|touching|clever|funny|witty",
        special_neg="predictable|tedious|silly|clumsy|pointless",
    ),
    _rules(
        place="hotel|hostel|inn|guest house",
        went="stayed at the {place}|spent two nights at the {place}|moved into the {place}",
        thing="room|bed|breakfast|bathroom|view|garden|lobby|pool|shower|balcony",
        person="manager|porter|receptionist|maid",
        special_pos="clean|cosy|quiet|spacious|comfortable",
        special_neg="dirty|noisy|cramped|mouldy|smelly",
    ),
    _rules(
        place="book|novel|story|biography",
        went="read the {place}|finished the {place}|talked about the {place}",
        thing="style|first chapter|hero|prose|last chapter|title|cover|language|theme",
        person="author|narrator|editor|translator",
        special_pos="moving|elegant|thoughtful|vivid|exciting",
        special_neg="confusing|shallow|long-winded|clichéd|lifeless",
    ),
    _rules(
        place="concert|show|festival|recital",
        went="heard the {place}|went to the {place}|had tickets for the {place}",
        thing="sound|stage|singing|first song|light show|hall|band|choir|rhythm|solo",
        person="singer|conductor|pianist|drummer",
        special_pos="lively|thrilling|harmonious|energetic|magical",
        special_neg="shrill|chaotic|lame|monotonous|deafening",
    ),
]

SLOT = re.compile(r"\{(!?)(\w+)\}")


class Writer:
    """Writes text from the grammar; the same seed gives the same text."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def _expand(self, rule: str, rules: Rules, label: int) -> str:
        """An alternative of the rule with its slots filled; `!` turns the sentiment around."""
        name = rule if rule in rules else f"{rule}_{('neg', 'pos')[label]}"
        return SLOT.sub(
            lambda slot: self._expand(slot[2], rules, 1 - label if slot[1] else label),
            self.random.choice(rules[name]),
        )

    def sentence(self, rule: str, rules: Rules, label: int = 0) -> str:
        """A sentence whose first letter and whose articles are right."""
        text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", self._expand(rule, rules, label))
        return text[0].upper() + text[1:]

    def _opinion(self, rules: Rules, label: int) -> str:
        rule = "contrast" if self.random.random() < 0.25 else "review"
        return self.sentence(rule, rules, label)

    def _domain(self) -> Rules:
        return COMMON | self.random.choice(DOMAINS)

    def document(self) -> str:
        """A review (75%), a neutral description (10%) or a chronicle (15%)."""
        kind, rules = self.random.random(), self._domain()
        if kind < 0.75:
            label, count = self.random.randrange(2), self.random.randint(4, 7)
            first = [self.sentence("opening", rules)] * self.random.randrange(2)
            return " ".join(first + [self._opinion(rules, label) for _ in range(count)])
        if kind < 0.85:
            return " ".join(self.sentence("neutral", rules) for _ in range(6))
        names = self.random.choices(["chronicle", "record"], k=6)
        return " ".join(self.sentence(name, rules) for name in names)

    def example(self, label: int) -> str:
        """One or two sentences of a review, at least one of them with an opinion."""
        rules, kind = self._domain(), self.random.random()
        if kind < 0.2:
            return self.sentence("opening", rules) + " " + self._opinion(rules, label)
        return " ".join(self._opinion(rules, label) for _ in range(1 if kind < 0.4 else 2))


def write_corpus(seed: int, documents: int = DOCUMENTS) -> list[str]:
    """The documents that the language model is trained on."""
    writer = Writer(seed)
    return [writer.document() for _ in range(documents)]


def write_examples(corpus: list[str], seed: int) -> list[dict[str, str | int]]:
    """Labelled texts, first those to train on, then those to test on.

    They all differ, none is part of a document, and half of them have each label.
    """
    writer, everything = Writer(seed), "\n".join(corpus)
    rows: dict[str, int] = {}
    while len(rows) < TRAIN_ROWS + TEST_ROWS:
        label = len(rows) % 2
        text = writer.example(label)
        if text not in rows and text not in everything:
            rows[text] = label
    return [{"text": text, "label": label} for text, label in rows.items()]


def check(corpus: list[str], rows: list[dict[str, str | int]]) -> None:
    """End the script if the base would be trained on anything of the task."""
    everything = "\n".join(corpus)
    counts = [len(re.findall(rf"\b{word}\b", everything)) for word in LABEL_WORDS]
    texts = [str(row["text"]) for row in rows]
    test = rows[TRAIN_ROWS:]
    problems = {
        "the prompt is in the corpus": PROMPT.strip() in everything,
        f"label words occur {counts} times": counts[0] != counts[1] or not counts[0],
        "a labelled text is in the corpus": any(text in everything for text in texts),
        "a labelled text comes twice": len(set(texts)) < len(texts),
        "test is not balanced": 2 * sum(int(row["label"]) for row in test) != len(test),
    }
    found = [problem for problem, present in problems.items() if present]
    if found:
        raise SystemExit("make_demo_model: " + "; ".join(found))


def train_tokenizer(corpus: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE, which puts `<bos>` before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    for word in LABEL_WORDS:
        if len(tokenizer.encode(f" {word}", add_special_tokens=False)) != 1:
            raise SystemExit(f"make_demo_model: {word!r} is not a single token")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        model_max_length=CONTEXT,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with fresh weights in float32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train_model(model: LlamaForCausalLM, documents: list[list[int]], pad: int) -> float:
    """Train for one epoch; returns the mean loss of its last tenth, in nats per token."""
    steps = len(documents) // BATCH_SIZE
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, (steps - step) / steps)
    )
    losses, start = [], time.perf_counter()
    for step in range(steps):
        batch = documents[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
        width = max(map(len, batch))
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in batch])
        # Padding is on the right, where causal attention does not see it: no mask is needed.
        loss = model(ids, labels=ids.masked_fill(ids == pad, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 0:
            print(f"step {step}/{steps} loss {loss:.3f} {time.perf_counter() - start:.0f} s")
    last = losses[-steps // 10 :]
    return sum(last) / len(last)


def write_rows(path: Path, rows: list[dict[str, str | int]]) -> None:
    """Write one JSON object a line."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Write the folder `model` and the two files of labelled texts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    default = Path(__file__).resolve().parent.parent / "zo_peft" / "embedded"
    parser.add_argument("--output_dir", type=Path, default=default)
    parser.add_argument("--documents", type=int, default=DOCUMENTS, help="of the training text")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.disable_progress_bar()
    torch.manual_seed(args.seed)
    # One thread: sums come in one order everywhere, and matrices this small gain little from two.
    torch.set_num_threads(1)

    corpus = write_corpus(args.seed, args.documents)
    rows = write_examples(corpus, args.seed + 1)
    check(corpus, rows)
    tokenizer = train_tokenizer(corpus)
    model = build_model(tokenizer)
    ids = tokenizer([text + "<eos>" for text in corpus], truncation=True, max_length=MAX_LENGTH)
    loss = train_model(model, ids["input_ids"], tokenizer.pad_token_id)

    folder = args.output_dir / "model"
    model.save_pretrained(folder)
    # safetensors lets only the owner read its files, but a package is read by others.
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    write_rows(args.output_dir / "train.jsonl", rows[:TRAIN_ROWS])
    write_rows(args.output_dir / "test.jsonl", rows[TRAIN_ROWS:])
    print(f"loss {loss:.3f}, {model.num_parameters():,} parameters, in {args.output_dir}")


if __name__ == "__main__":
    main()
