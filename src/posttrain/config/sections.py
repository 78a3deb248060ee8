"""Settings of a recipe beside its trainer's keys, as dataclasses. `recipes.py` says which recipe has which.

Not used: TRL's `ModelConfig`, whose `lora_*` and `use_peft` fields would repeat the settings in `adapter`.
"""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class ModelSettings:
    """The base model, and how it is loaded."""

    model_name_or_path: str = ""
    model_revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: str | None = None
    load_in_4bit: bool = False  # QLoRA: NF4 weights through bitsandbytes (Dettmers et al., 2023)
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True


@dataclass(frozen=True)
class ParallelSettings:
    """How one model is split over processes. The number of data-parallel copies is num_processes / (tensor x pipeline).

    The accelerate config has num_processes. `distributed/split/layout.py` says which models can be split.
    """

    tensor_parallel_size: int = field(default=1, metadata={"min": 1})  # processes that share each layer
    pipeline_parallel_size: int = field(default=1, metadata={"min": 1})  # stages, each a run of consecutive layers
    pipeline_schedule: Literal["1f1b", "gpipe"] = "1f1b"  # Narayanan et al., 2019; Huang et al., 2019
    pipeline_micro_batches: int = field(default=4, metadata={"min": 1})  # parts of per_device_train_batch_size


@dataclass(frozen=True)
class DataSettings:
    """Where the rows come from. A file is .json, .jsonl (.gz), .csv or .parquet, or a folder of them.

    `train_file` may be a list of `{path, weight}`: a weight is the expected share of rows from that file.
    """

    train_file: Any = None
    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    data_format: Literal[
        "auto", "text", "messages", "prompt_completion", "prompt", "preference", "unpaired", "alpaca", "sharegpt"
    ] = "auto"
    on_bad_row: Literal["stop", "skip"] = "stop"
    max_train_rows: int | None = field(default=None, metadata={"min": 1})


@dataclass(frozen=True)
class ValidationSettings:
    """Held-out rows for evaluation during training or at its end: a file, or a split of the hub dataset."""

    validation_file: Any = None
    dataset_test_split: str | None = None


@dataclass(frozen=True)
class EvaluationSettings:
    """Exact match on held-out prompt-completion rows, greedy and sampled at temperature 1."""

    test_file: Any = None
    test_rows: int | None = field(default=None, metadata={"min": 1})
    test_samples: int = field(default=4, metadata={"min": 0})


@dataclass(frozen=True)
class GenerationSettings:
    """How completions are sampled outside of a trainer."""

    max_new_tokens: int = field(default=64, metadata={"min": 1})
    generation_batch_size: int = field(default=64, metadata={"min": 1})
    seed: int = field(default=42, metadata={"min": 0})


@dataclass(frozen=True)
class RunSettings:
    """Settings of a recipe without a trainer: `output_dir` is otherwise a key of the trainer's class."""

    output_dir: str = ""


@dataclass(frozen=True)
class SampleSettings:
    """Sampling several completions per prompt, and ranking them into preference pairs."""

    num_samples: int = field(default=8, metadata={"min": 2})
    temperature: float = field(default=1.0, metadata={"above": 0})
    top_p: float = field(default=1.0, metadata={"above": 0, "max": 1})
    verifier: str | None = None  # exact_match | regex:PATTERN | module:function; null if a reward model scores
    pairs_per_prompt: int = field(default=1, metadata={"min": 1})
    validation_share: float = field(default=0.1, metadata={"min": 0, "max": 0.5})


@dataclass(frozen=True)
class PPOSettings:
    """PPO's rewards other than the reward model of `inputs.reward`."""

    verifier: str | None = None  # exact_match | regex:PATTERN | module:function


@dataclass(frozen=True)
class TrackingSettings:
    """The dashboards that a stage reports to, beside its own record. Defaults: see `tracking/select.py`."""

    report_to: list[Literal["none", "trackio", "wandb"]] | Literal["none", "trackio", "wandb"] | None = None
    project: str | None = None  # null: WANDB_PROJECT, else posttrain; trackio's project is the chain
    run_name: str | None = None  # null: the stage's name
    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    wandb_entity: str | None = None
    # Content of an online run's artifact: lineage.json, which has the hash of each file; or the files too.
    wandb_artifacts: Literal["lineage", "files", "none"] = "lineage"


@dataclass(frozen=True)
class NerDataSettings:
    """How files of tagged sentences are read. Anything but .json, .jsonl (.gz) and .parquet is read as columns."""

    # Columns: one token per line, a blank line after a sentence. Indices start at 0; negative ones count from the end.
    token_column: int = 0
    tag_column: int = -1
    separator: Literal["auto", "tab", "space"] = "auto"  # auto: as in the first line with a token
    encoding: str = "utf-8"  # of columns only: JSON is UTF-8 by its standard
    strip_segmentation: bool = False  # Weibo NER: "科0" is the character 科 at position 0 of its word

    # Rows, in files and on the hub: tokens with one tag each, or text with character spans.
    tokens_key: str = "tokens"
    tags_key: str | None = None  # null: tags, ner_tags or labels, whichever the row has
    text_key: str = "text"
    spans_key: str | None = None  # null: entities, spans, label or labels, whichever the row has

    tag_scheme: Literal["auto", "bio", "iob1", "bioes", "bmes", "io"] = "auto"
    # Tags in an order that the scheme forbids. repair: read them as conlleval does (ner/tags.py).
    on_bad_tags: Literal["stop", "repair"] = "stop"
    # Any other error in a row or a sentence.
    on_bad_row: Literal["stop", "skip"] = "stop"
    # A type that occurs in validation or test data only. outside: its entities become O.
    on_unseen_tag: Literal["stop", "outside"] = "stop"


@dataclass(frozen=True)
class NerSettings:
    """The sentences of the recipe `ner`, and how long ones are split."""

    train_file: Any = None  # a path, or a list of paths
    validation_file: Any = None
    test_file: Any = None
    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    dataset_validation_split: str | None = None
    dataset_test_split: str | None = None
    max_train_rows: int | None = field(default=None, metadata={"min": 1})
    max_length: int = field(default=256, metadata={"min": 8})  # tokens per window, [CLS] and [SEP] included
    long_sentences: Literal["window", "cut"] = "window"
    window_overlap: int = field(default=32, metadata={"min": 0})  # tokens that neighbouring windows share


@dataclass(frozen=True)
class AdapterSettings:
    """Group `adapter`. `peft_methods.py` says which fields each method uses, and what it can do."""

    method: Literal[
        "lora", "rslora", "dora", "pissa", "olora", "adalora", "ia3", "vera", "oft", "boft", "loha", "lokr",
        "ln_tuning", "prompt_tuning", "prefix_tuning", "p_tuning", "p_tuning_v2", "bottleneck", "none",
    ] = "lora"  # fmt: skip
    r: int = field(default=16, metadata={"min": 1})
    alpha: float = field(default=32, metadata={"above": 0})
    dropout: float = field(default=0.0, metadata={"min": 0, "max": 0.99})
    target_modules: Any = None  # a list of names, all-linear, or null: the method's own choice
    modules_to_save: list[str] | None = None
    num_virtual_tokens: int = field(default=20, metadata={"min": 1})
    encoder_hidden_size: int | None = field(default=None, metadata={"min": 1})  # of the encoder of virtual tokens
    reduction_factor: int = field(default=16, metadata={"min": 2})  # hidden size over bottleneck size
    block_size: int = field(default=32, metadata={"min": 2})  # of OFT and BOFT; must divide every target's input size
    start: Literal["continue", "merge"] = "continue"  # how a stage starts from its input's adapter


@dataclass(frozen=True)
class PolicyGates:
    """Group `gates` of a recipe that trains a policy: checks that it must pass before the next stage may use it."""

    stops: float | None = field(default=None, metadata={"min": 0, "max": 1})  # share of completions that end by EOS


@dataclass(frozen=True)
class RewardGates:
    """Group `gates` of a reward model."""

    reward_accuracy: float | None = field(default=None, metadata={"min": 0, "max": 1})  # floor, on validation pairs


@dataclass(frozen=True)
class NerGates:
    """Group `gates` of a tagger."""

    f1: float | None = field(default=None, metadata={"min": 0, "max": 1})  # floor, on the test sentences
