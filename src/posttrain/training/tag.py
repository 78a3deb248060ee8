"""`posttrain tag`: the entities in a text, found by a tagger of the recipe `ner` or another token classifier."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters import load_policy
from ..config.sections import ModelSettings
from ..errors import ArtifactError, DataError
from ..models.loading import check_base, load_tokenizer
from ..ner.alignment import check_tokenizer, encode, predict
from ..ner.rows import split_words
from ..ner.tags import recognise_scheme, spans, to_bio
from ..runs.lineage import is_complete, verify

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_LENGTH, OVERLAP = 256, 32  # for a plain model, which has no lineage that says how it was trained


@dataclass(frozen=True)
class Entity:
    """`text` is at characters `start` to `end` (exclusive); `score` is the mean probability of its words' tags."""

    type: str
    text: str
    start: int
    end: int
    score: float


def tag(model_dir: Path, text: str, *, as_json: bool = False) -> None:
    """Print the entities of a text, or of each line of a file. Raises a PosttrainError."""
    import transformers

    transformers.logging.set_verbosity_error()  # print entities only, no loader warnings
    transformers.logging.disable_progress_bar()
    file = Path(text)
    texts = _lines(file) if len(text) < 256 and file.is_file() else [text]
    model, tokenizer, max_length, overlap = load_tagger(model_dir)
    for line, found in zip(texts, tag_texts(model, tokenizer, texts, max_length, overlap), strict=True):
        if as_json:
            print(json.dumps({"text": line, "entities": [asdict(e) for e in found]}, ensure_ascii=False))
            continue
        if len(texts) > 1:
            print(line)
        for e in found:
            print(f"{e.type:<8}{e.text}  [{e.start}:{e.end}]  {e.score:.3f}")
        if not found and len(texts) == 1:
            print("no entity")


def _lines(file: Path) -> list[str]:
    try:
        texts = [line for line in file.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8; convert it with `iconv -f OLD -t UTF-8`") from error
    if not texts:
        raise DataError(f"{file} has no text")
    return texts


def load_tagger(model_dir: Path) -> tuple[Any, Any, int, int]:
    """(model, tokenizer, tokens per window, overlap of windows) of a run directory or of a plain model's folder.

    Raises ArtifactError when it is no tagger.
    """
    if is_complete(model_dir):
        lineage = verify(model_dir)
        if lineage.task != "TOKEN_CLS":
            raise ArtifactError(f"{model_dir} is no tagger (recipe {lineage.recipe}); use a run of the recipe ner")
        model = load_policy(model_dir)
        tokenizer = load_tokenizer(str(model_dir / lineage.kind), ModelSettings(), task="TOKEN_CLS")
        window, overlap = lineage.config["max_length"], lineage.config["window_overlap"]
    else:
        from transformers import AutoConfig, AutoModelForTokenClassification

        name = check_base(ModelSettings(model_name_or_path=str(model_dir)), None)
        made_for = AutoConfig.from_pretrained(name).architectures or ["nothing known"]
        if not made_for[0].endswith("ForTokenClassification"):
            raise ArtifactError(f"{model_dir} is {made_for[0]}, not a token-classification model")
        model = AutoModelForTokenClassification.from_pretrained(name, use_safetensors=True)
        tokenizer = load_tokenizer(name, ModelSettings(), task="TOKEN_CLS")
        window, overlap = MAX_LENGTH, OVERLAP
    check_tokenizer(tokenizer)
    return model, tokenizer, window, overlap


def tag_texts(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    max_length: int = MAX_LENGTH,
    overlap: int = OVERLAP,
) -> list[list[Entity]]:
    """The entities of each text, in order. Texts are split into words as in training (`ner.rows.split_words`)."""
    labels = model.config.id2label
    scheme = recognise_scheme([list(labels.values())])
    offsets = [split_words(text) for text in texts]
    words = [[text[a:b] for a, b in cut] for text, cut in zip(texts, offsets, strict=True)]
    classes, sure = predict(model, tokenizer, encode(words, tokenizer, max_length=max_length, overlap=overlap))
    found: list[list[Entity]] = []
    for text, cut, numbers, probabilities in zip(texts, offsets, classes, sure, strict=True):
        entities = []
        for first, last, label in spans(to_bio([labels[n] for n in numbers], scheme, repair=True)):
            start, end = cut[first][0], cut[last - 1][1]
            score = sum(probabilities[first:last]) / (last - first)
            entities.append(Entity(label, text[start:end], start, end, round(score, 4)))
        found.append(entities)
    return found
