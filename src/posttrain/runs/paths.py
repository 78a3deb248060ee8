"""The names of the files and folders in a run directory, and in the folder of a chain."""

LINEAGE = "lineage.json"
ANSWERS = "answers"
CARD = "README.md"  # in a result's folder; people edit it, so it is not part of the digest
MARKER = "stage.json"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"
METRICS, COMPLETIONS, ALERTS = "metrics.jsonl", "completions.jsonl", "alerts.jsonl"
RUN = "tracking.json"  # in a run directory: its run in each dashboard
OWNER = "chain.json"  # in the folder above: the chain that owns it
ADAPTER = "adapter"  # the folder of a run's adapter
MODEL = "model"  # the folder of a run's full weights, if adapter.method is none
