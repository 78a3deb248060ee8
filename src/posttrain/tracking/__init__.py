"""What a stage shows while it runs and after: one record, and the dashboards that are fed from it.

    record.py        metrics.jsonl, completions.jsonl, alerts.jsonl: what counts
    trackio_sink.py  a local page without an account: what is there when nobody chose
    wandb_sink.py    W&B, online, offline or disabled
    choice.py        which of them, decided before anything is loaded
    tracker.py       the fan-out: same names, steps and values; a dashboard that fails never stops training
    callback.py      the trainer's logs, completions and alerts, handed to it
    performance.py   seconds by phase, tokens/s, share of peak; machine.py: memory, energy, the peak
    dashboard.py     the W&B workspace and the local page of a chain

Nothing here imports torch before training does.
"""
