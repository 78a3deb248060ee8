"""`posttrain merge`: merge a run's adapter into its base, write a plain model, read it back and compare its outputs.

A 4-bit base is dequantised first, since merging into NF4 weights rounds the adapter away (huggingface/peft#2321).
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters import load_policy, unload_merged
from ..config.peft_methods import METHODS
from ..config.sections import ModelSettings
from ..errors import ArtifactError, GateError
from ..models.loading import load_base, load_tokenizer
from ..runs.card import write_card
from ..runs.lineage import verify
from .gates import dtype_of, probe_logprobs, same_outputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def merge(run_dir: Path, output: Path) -> None:
    """Write the merged model of `run_dir` to the new folder `output`, completely or not at all.

    Raises ArtifactError when the run has no adapter that can be merged or the folder exists, GateError when the merged
    model's outputs differ from the adapter's.
    """
    lineage = verify(run_dir)
    if lineage.kind != "adapter":
        raise ArtifactError(f"{run_dir} holds {lineage.kind}, not an adapter: there is nothing to merge")
    made_with = lineage.config["adapter"]["method"]
    if not METHODS[made_with].mergeable:
        raise ArtifactError(
            f"{run_dir} was made with {made_with}, which cannot be merged into its base: load it as an adapter"
        )
    if output.exists():
        raise ArtifactError(f"{output} exists; choose a new folder")
    tokenizer = load_tokenizer(lineage.base["name"], ModelSettings(), task=lineage.task or "CAUSAL_LM")
    model = load_policy(run_dir, dequantize=True)
    probe = lineage.metrics["probe"]
    expected = _outputs(model, tokenizer, probe)
    merged = unload_merged(model)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    merged.save_pretrained(str(partial))
    tokenizer.save_pretrained(str(partial))
    source = {"run": str(run_dir.resolve()), "key": lineage.key, "digest": lineage.digest, "task": lineage.task}
    (partial / "posttrain.json").write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
    name, dtype = type(merged).__name__, dtype_of(merged)
    settings = ModelSettings(dtype=dtype)  # type: ignore[arg-type]
    del model, merged  # one model in memory at a time
    labels = lineage.metrics.get("labels", ())
    written = load_base(str(partial), settings, task=lineage.task or "CAUSAL_LM", labels=labels)
    written.config.pad_token_id = lineage.base["pad_token_id"]
    gate = same_outputs("merge", _outputs(written, tokenizer, probe), expected, dtype=dtype)
    if not gate.passed:
        shutil.rmtree(partial)
        raise GateError(f"merging {run_dir} changed its outputs by {gate.value:.4g}, must be {gate.accepted}")
    write_card(partial, lineage, merged=True)
    partial.replace(output)
    print(f"{output}: {name}, outputs within {gate.value:.2g} of the adapter's")


def _outputs(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", probe: dict[str, Any]) -> list[float]:
    if "scores" in probe:
        from ..models.scoring import score

        return score(model, tokenizer, probe["input_ids"])
    if "logits" in probe:
        from ..ner.alignment import probe_logits

        return probe_logits(model, probe["input_ids"])
    return probe_logprobs(model, probe["input_ids"])
