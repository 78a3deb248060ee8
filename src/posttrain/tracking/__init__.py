"""Tracking of a stage: its record, and the dashboards that are fed from it.

    (runs/record.py)  metrics.jsonl, completions.jsonl, alerts.jsonl: written first
    trackio_sink.py  a local page without an account; the default
    wandb_sink.py    W&B, online, offline or disabled
    select.py         which of them, decided before anything is loaded
    tracker.py       sends the same names, steps and values to each; a dashboard that fails never stops training
    callback.py      hands the trainer's logs, completions and alerts to the tracker
    performance.py   seconds by phase, tokens/s, share of peak
    machine.py        memory, energy, peak rate
    (report/dashboard.py)  the W&B workspace and the local page of a chain

Nothing here imports torch before training does.
"""
