"""The names of the files and folders in a run directory, and in the folder of a chain. Imports nothing.

runs/CHAIN/                  a chain's output_dir
  chain.json                 whose it is
  .logs/ .previous/          what the stages printed; outdated results
  STAGE/                     a run directory: of a stage, or of a recipe on its own
"""

# A run directory

CONFIG = "config.yaml"  # the effective configuration
MARKER = "stage.json"  # whose it is, by the stage's key; written when it is taken
LOCK = ".lock"  # held while a process works there
METRICS, COMPLETIONS, ALERTS = "metrics.jsonl", "completions.jsonl", "alerts.jsonl"  # the record
RUN = "tracking.json"  # which run it is in each dashboard
CHECKPOINTS = "checkpoints"  # to resume from; removed when the stage is complete
CHECKPOINT = "checkpoint-"  # one of them, with its step behind; transformers' name
DRAWN = "drawn"  # batches of completions, until a sampling stage is complete
GATES = "gates.json"  # what the stage had to prove, passed or not
ADAPTER = "adapter"  # a result: an adapter
MODEL = "model"  # a result: full weights, where adapter.method is none
DATA = "data"  # a result: rows
EVALUATION = "evaluation"  # a result: measurements
CARD = "README.md"  # of a result's folder; people edit it, so it is no part of a digest
ANSWERS = "answers"  # to the test rows, a file each for before and after the stage
LINEAGE = "lineage.json"  # written last: its presence means that the stage is complete

# The folder of a chain

OWNER = "chain.json"  # whose it is
LOGS = ".logs"
PREVIOUS = ".previous"
