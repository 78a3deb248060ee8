"""The names of the files and folders in a run directory, and in the folder of a chain."""

LINEAGE = "lineage.json"
ANSWERS = "answers"
CARD = "README.md"  # of a result's folder; people edit it, so it is no part of a digest
MARKER = "stage.json"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"
METRICS, COMPLETIONS, ALERTS = "metrics.jsonl", "completions.jsonl", "alerts.jsonl"
RUN = "tracking.json"  # in a run directory: which run it is in each dashboard
OWNER = "chain.json"  # in the folder above: whose stage it is
ADAPTER = "adapter"  # the folder of a run's adapter
MODEL = "model"  # the folder of a run's full weights, when adapter.method is none
