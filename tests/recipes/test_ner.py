"""The recipe `ner` as a user runs it: file formats found on the web, bad input, the resulting tagger."""

import json
import subprocess
import sys

import pytest
from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline

from conftest import SENTENCES, run_here, run_recipe, write_conll
from posttrain.errors import ArtifactError, ConfigError, DataError, GateError
from posttrain.training.merge import merge
from posttrain.training.tag import load_tagger, tag_texts

SMALL = [
    "--per_device_train_batch_size", "6", "--learning_rate", "0.02", "--max_steps", "40", "--logging_steps", "10",
    "--bf16", "false", "--max_length", "64", "--window_overlap", "8", "--adapter.r", "8", "--adapter.alpha", "16",
    "--eval_strategy", "steps", "--eval_steps", "20",
]  # fmt: skip
TEXT = "Ada Lovelace met Alan Turing in Oslo."


@pytest.fixture(scope="module")
def tagger(tiny_bert, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ner")
    file = write_conll(folder / "all.conll")
    run_here(
        "ner", "--model_name_or_path", tiny_bert, "--train_file", file, "--validation_file", file, "--test_file", file,
        "--output_dir", folder / "run", "--gates.f1", "0.9", *SMALL,
    )  # fmt: skip
    return folder / "run"


def lineage(run):
    return json.loads((run / "lineage.json").read_text())


def test_a_tagger_is_trained_measured_and_proven(tagger):
    found = lineage(tagger)
    assert found["task"] == "TOKEN_CLS"
    assert found["metrics"]["labels"] == ["O", "B-LOC", "I-LOC", "B-ORG", "I-ORG", "B-PER", "I-PER"]
    assert {g["name"] for g in found["gates"]} == {"reload", "f1"}
    logs = [json.loads(line) for line in (tagger / "metrics.jsonl").read_text().splitlines()]
    evaluated = [r["eval/f1"] for r in logs if "eval/f1" in r]
    assert len(evaluated) == 2
    assert evaluated[-1] == pytest.approx(found["metrics"]["f1"])  # the same sentences, whatever the trainer's order
    assert {"eval/f1_PER", "eval/precision", "eval/recall"} <= {name for r in logs for name in r}
    summary = json.loads((tagger / "answers" / "test.json").read_text())
    assert summary["scores"]["micro"]["support"] == 12
    assert not (tagger / "checkpoints").exists()


def test_its_entities_are_those_of_transformers_pipeline(tagger, tmp_path):
    model, tokenizer, window, overlap = load_tagger(tagger)
    found = tag_texts(model, tokenizer, [TEXT], window, overlap)[0]
    assert (found[0].type, found[0].text) == ("PER", "Ada Lovelace")
    assert all(TEXT[e.start : e.end] == e.text for e in found)
    merge(tagger, tmp_path / "plain")
    theirs = pipeline("token-classification", str(tmp_path / "plain"), aggregation_strategy="first")(TEXT)
    assert [(e.type, e.start, e.end) for e in found] == [(t["entity_group"], t["start"], t["end"]) for t in theirs]
    assert [e.score for e in found] == pytest.approx([float(t["score"]) for t in theirs], abs=1e-3)


def test_the_command_prints_entities(tagger, tmp_path, forked_processes):
    def command(*arguments, code=0):
        done = subprocess.run(
            [sys.executable, "-m", "posttrain.cli", "tag", *map(str, arguments)], capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr
        return done

    (tmp_path / "texts.txt").write_text(f"{TEXT}\nIt rained all day.\n")
    lines = command(tagger, tmp_path / "texts.txt").stdout.splitlines()
    assert (lines[0], lines[-1]) == (TEXT, "It rained all day.")
    assert lines[1].startswith("PER     Ada Lovelace  [0:12]  0.")
    rows = [json.loads(line) for line in command(tagger, tmp_path / "texts.txt", "--json").stdout.splitlines()]
    assert [row["text"] for row in rows] == [TEXT, "It rained all day."]
    assert rows[0]["entities"][0]["text"] == "Ada Lovelace"


def test_a_run_that_is_no_tagger_is_refused(tiny, tmp_path):
    with pytest.raises(ArtifactError, match="not a model's folder"):
        load_tagger(tmp_path)
    with pytest.raises(ArtifactError, match="is LlamaForCausalLM, not a token-classification model"):
        load_tagger(tiny)


def columns(text, separator=" "):
    """`Ada NNP I-PER | met VBD O || ...`: tokens parted by |, sentences by ||."""
    return text.replace(" || ", "\n\n").replace(" | ", "\n").replace(" ", separator) + "\n\n"


SPANS = [
    {
        "text": "王小明在北京",
        "entities": [{"start": 0, "end": 3, "label": "PER"}, {"start": 4, "end": 6, "label": "LOC"}],
    },
    {"text": "Ada left Rome.", "entities": [[0, 3, "PER"], [9, 13, "LOC"]]},
]
TOKENS = [{"tokens": ["Ada", "left"], "ner_tags": ["B-PER", "O"]}, {"tokens": ["Rome"], "ner_tags": ["B-LOC"]}]
FILES = {
    "CoNLL-2003": (
        "eng.train",
        columns(
            "-DOCSTART- -X- -X- O || Ada NNP B-NP I-PER | Lovelace NNP I-NP I-PER | Alan NNP B-NP B-PER"
            " | met VBD B-VP O | Acme NNP B-NP I-ORG || Rome NNP B-NP I-LOC | rained VBD B-VP O | . . O O"
        ),
    ),
    "WNUT-17": (
        "wnut17train.conll",
        columns("Ada B-person | left O", "\t") + "\t\n" + columns('#Rome O | " O | Oslo B-location', "\t"),
    ),
    "wikigold": (
        "wikigold.conll.txt",
        columns("-DOCSTART- O || Ada I-PER | Lovelace I-PER | met O | Acme I-ORG || Rome I-LOC | . O"),
    ),
    "Weibo": (
        "weiboNER.conll.train",
        columns(
            "王 B-PER.NAM | 小 I-PER.NAM | 明 I-PER.NAM | 在 O | 北 B-LOC.NAM | 京 I-LOC.NAM || 李 B-PER.NOM | 去 O",
            "\t",
        ),
    ),
    "Resume": (
        "train.char.bmes",
        columns(
            "王 B-NAME | 小 M-NAME | 明 E-NAME | 在 O | 北 B-ORG | 京 M-ORG | 大 M-ORG | 学 E-ORG"
            " || 李 S-NAME | 读 O | 书 O"
        ),
    ),
    "spans": ("rows.jsonl", "".join(json.dumps(row) + "\n" for row in SPANS)),
    "tokens": ("rows.json", json.dumps(TOKENS)),
}
TYPES = {
    "CoNLL-2003": ["LOC", "ORG", "PER"], "WNUT-17": ["location", "person"], "wikigold": ["LOC", "ORG", "PER"],
    "Weibo": ["LOC.NAM", "PER.NAM", "PER.NOM"], "Resume": ["NAME", "ORG"], "spans": ["LOC", "PER"],
    "tokens": ["LOC", "PER"],
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_in_formats_found_on_the_web(name, tiny_bert, tmp_path):
    """Trained to memorise the file: F1 shows whether it was read as meant."""
    file = tmp_path / FILES[name][0]
    file.write_text(FILES[name][1], encoding="utf-8")
    run_here(
        "ner", "--model_name_or_path", tiny_bert, "--train_file", file, "--test_file", file,
        "--output_dir", tmp_path / "run", *SMALL, "--eval_strategy", "no", "--max_steps", "60",
    )  # fmt: skip
    found = lineage(tmp_path / "run")["metrics"]
    assert found["labels"] == ["O", *(f"{p}-{t}" for t in TYPES[name] for p in "BI")]
    assert found["f1"] == 1.0


def test_chinese_is_tagged_by_character(tiny_bert, tmp_path):
    file = tmp_path / "train.char.bmes"
    file.write_text(FILES["Resume"][1], encoding="utf-8")
    run_here(
        "ner", "--model_name_or_path", tiny_bert, "--train_file", file, "--output_dir", tmp_path / "run", *SMALL,
        "--eval_strategy", "no", "--max_steps", "60",
    )  # fmt: skip
    model, tokenizer, window, overlap = load_tagger(tmp_path / "run")
    found = tag_texts(model, tokenizer, ["王小明在北京大学"], window, overlap)[0]
    assert [(e.type, e.text) for e in found] == [("NAME", "王小明"), ("ORG", "北京大学")]


def test_a_long_sentence_is_windowed_and_no_entity_is_lost(tiny_bert, tmp_path, capsys):
    long = [pair for sentence in SENTENCES for pair in sentence]
    file = write_conll(tmp_path / "long.conll", [long, *SENTENCES])
    arguments = ["--model_name_or_path", tiny_bert, "--train_file", file, "--test_file", file, *SMALL]
    arguments += ["--eval_strategy", "no", "--max_length", "24", "--max_steps", "80"]
    run_here("ner", *arguments, "--output_dir", tmp_path / "window")
    assert "1 long sentences in windows" in capsys.readouterr().out
    assert lineage(tmp_path / "window")["metrics"]["f1"] == 1.0
    run_here("ner", *arguments, "--long_sentences", "cut", "--output_dir", tmp_path / "cut")
    assert "1 long sentences cut" in capsys.readouterr().out
    assert lineage(tmp_path / "cut")["metrics"]["f1"] < 1.0  # what was cut counts as missed


def test_a_resumed_run_equals_the_uninterrupted_run(tiny_bert, tmp_path):
    import shutil

    from safetensors.torch import load_file

    from posttrain.training.stage import Stage

    file = write_conll(tmp_path / "all.conll")
    arguments = ["--model_name_or_path", tiny_bert, "--train_file", file, "--validation_file", file, *SMALL]
    arguments += ["--save_steps", "10", "--adapter.dropout", "0.1"]
    run_here("ner", *arguments, "--output_dir", tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "save", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_here("ner", *arguments, "--output_dir", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "checkpoint-40")
    run_here("ner", *arguments, "--output_dir", tmp_path / "cut")
    a, b = (load_file(tmp_path / d / "adapter" / "adapter_model.safetensors") for d in ("whole", "cut"))
    assert all((a[k] == b[k]).all() for k in a)


def test_a_gate_stops_a_bad_tagger(tiny_bert, tmp_path):
    file = write_conll(tmp_path / "all.conll")
    with pytest.raises(GateError, match=r"f1: .*, must be at least 0.9 \(micro F1 of entities"):
        run_here(
            "ner", "--model_name_or_path", tiny_bert, "--train_file", file, "--test_file", file, "--gates.f1", "0.9",
            "--output_dir", tmp_path / "run", *SMALL, "--eval_strategy", "no", "--max_steps", "1",
        )  # fmt: skip


BAD = {
    "ragged columns": (
        "Ada B-PER\nleft\nRome B-LOC\n",
        r"train.conll, line 1: line 2 has 1 column, expected 2 as in line 1: 'left'",
    ),
    "an I- after O": ("Ada B-PER\nleft O\nRome I-LOC\n", r"train.conll, line 1: .*I-LOC"),
    "no entity": ("Ada O\nleft O\n", r"no entity in it, only O"),
    "no tag": ("Ada NNP\nleft VBD\n", r"NNP"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file(name, tiny_bert, tmp_path):
    (tmp_path / "train.conll").write_text(BAD[name][0])
    with pytest.raises(DataError, match=BAD[name][1]):
        run_here(
            "ner", "--model_name_or_path", tiny_bert, "--train_file", tmp_path / "train.conll",
            "--output_dir", tmp_path / "run", *SMALL,
        )  # fmt: skip


def test_tags_that_are_repaired_are_counted(tiny_bert, tmp_path, capsys):
    (tmp_path / "train.conll").write_text(BAD["an I- after O"][0])
    run_here(
        "ner", "--model_name_or_path", tiny_bert, "--train_file", tmp_path / "train.conll", "--on_bad_tags", "repair",
        "--output_dir", tmp_path / "run", *SMALL, "--eval_strategy", "no", "--max_steps", "1",
    )  # fmt: skip
    assert "1 sentences, bio, 1 repaired" in capsys.readouterr().out


def test_a_type_that_training_never_saw(tiny_bert, tmp_path):
    train, test = write_conll(tmp_path / "train.conll", SENTENCES[1:2]), write_conll(tmp_path / "test.conll")
    arguments = ["--model_name_or_path", tiny_bert, "--train_file", train, "--test_file", test, *SMALL]
    arguments += ["--eval_strategy", "no", "--max_steps", "1"]
    with pytest.raises(DataError, match=r"test_file: entities of types that are not in train_file: ORG \(3, first in"):
        run_here("ner", *arguments, "--output_dir", tmp_path / "run")
    run_here("ner", *arguments, "--on_unseen_tag", "outside", "--output_dir", tmp_path / "run2")


def test_a_window_that_the_model_has_no_positions_for(tiny_bert, tmp_path):
    file = write_conll(tmp_path / "all.conll")
    arguments = ["--model_name_or_path", tiny_bert, "--train_file", file, *SMALL, "--eval_strategy", "no"]
    with pytest.raises(
        ConfigError, match=r"max_length is 200, and .* has 128 positions; set max_length to 128 or less"
    ):
        run_here("ner", *arguments, "--max_length", "200", "--output_dir", tmp_path / "run")


def test_a_sentence_without_a_token_leaves_the_loss_finite(tiny_bert, tmp_path):
    file = write_conll(tmp_path / "all.conll", [[("\u200b", "O")], *SENTENCES[:2]])
    run_here(
        "ner", "--model_name_or_path", tiny_bert, "--train_file", file, "--output_dir", tmp_path / "run", *SMALL,
        "--eval_strategy", "no", "--per_device_train_batch_size", "1", "--max_steps", "6", "--logging_steps", "1",
    )  # fmt: skip
    logs = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < r["train/loss"] < 10 for r in logs if "train/loss" in r)


def test_accumulated_batches_equal_one_batch(tiny_bert, tmp_path):
    """First loss and gradient of 6 rows at once and as 3 x 2: transformers would take BERT's mean loss for a sum."""
    file = write_conll(tmp_path / "all.conll", [SENTENCES[1]] * 6)
    first = []
    for rows, times in ((6, 1), (2, 3)):
        run = tmp_path / str(rows)
        run_here(
            "ner", "--model_name_or_path", tiny_bert, "--train_file", file, "--output_dir", run, *SMALL,
            "--eval_strategy", "no", "--per_device_train_batch_size", rows, "--gradient_accumulation_steps", times,
            "--max_steps", "1", "--logging_steps", "1",
        )  # fmt: skip
        first.append(json.loads((run / "metrics.jsonl").read_text().splitlines()[0]))
    assert first[1]["train/loss"] == pytest.approx(first[0]["train/loss"], rel=1e-4)
    assert first[1]["train/grad_norm"] == pytest.approx(first[0]["train/grad_norm"], rel=1e-3)


def test_a_floor_without_sentences_to_measure_on(tiny_bert, tmp_path):
    file = write_conll(tmp_path / "all.conll")
    with pytest.raises(ConfigError, match=r"gates.f1 needs sentences to measure on"):
        run_here(
            "ner", "--model_name_or_path", tiny_bert, "--train_file", file, "--gates.f1", "0.9",
            "--output_dir", tmp_path / "run", *SMALL, "--eval_strategy", "no",
        )  # fmt: skip


def test_an_unknown_input(tiny_bert, tmp_path):
    with pytest.raises(ConfigError, match=r"unknown key 'inputs.policy'"):
        run_here("ner", "--inputs.policy", "x", "--output_dir", tmp_path / "run")


def test_bad_input_leaves_with_code_2_and_no_traceback(tiny_bert, tmp_path):
    (tmp_path / "train.conll").write_bytes("Ada B-PER\nMünchen B-LOC\n".encode("latin-1"))
    done = run_recipe(
        "ner", "--model_name_or_path", tiny_bert, "--train_file", tmp_path / "train.conll",
        "--output_dir", tmp_path / "run", expect=2,
    )  # fmt: skip
    assert "train.conll, line 2: not utf-8 (byte 0xfc); set encoding" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_demos_splits_share_no_names_or_templates(tmp_path):
    """No name or template is in two splits; no test name is in a training sentence."""
    from posttrain.demo.entities import make_sentences
    from posttrain.ner.tags import spans

    made = make_sentences({"train": 300, "validation": 100, "test": 200})
    names, frames = {}, {}
    for split, sentences in made.items():
        names[split], frames[split] = set(), set()
        for sentence in sentences:
            words, tags = zip(*sentence, strict=True)
            names[split] |= {" ".join(words[a:b]).lower() for a, b, _ in spans(list(tags))}
            frames[split].add(" ".join(word for word, tag in sentence if tag == "O" and word != ","))
    for a, b in (("train", "test"), ("train", "validation"), ("validation", "test")):
        assert not names[a] & names[b]
        assert not frames[a] & frames[b]
    assert made == make_sentences({"train": 300, "validation": 100, "test": 200})
    assert min(len(n) for n in names.values()) > 100


def test_a_full_model_loads_in_a_pipeline(tiny_bert, tmp_path):
    file = write_conll(tmp_path / "all.conll")
    run_here(
        "ner", "--model_name_or_path", tiny_bert, "--train_file", file, "--output_dir", tmp_path / "run", *SMALL[:-8],
        "--adapter.method", "none", "--learning_rate", "0.005",
    )  # fmt: skip
    theirs = pipeline("token-classification", str(tmp_path / "run" / "model"), aggregation_strategy="first")(TEXT)
    model, tokenizer = (
        cls.from_pretrained(tmp_path / "run" / "model") for cls in (AutoModelForTokenClassification, AutoTokenizer)
    )
    found = tag_texts(model, tokenizer, [TEXT], 64, 8)[0]
    assert [(e.type, e.text) for e in found] == [(t["entity_group"], TEXT[t["start"] : t["end"]]) for t in theirs]
