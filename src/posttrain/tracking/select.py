"""The dashboards of a stage, and the mode of W&B: decided, checked and printed before anything is loaded.

    report_to: none | trackio | wandb, or a list; unset: $POSTTRAIN_REPORT_TO, else trackio if it is installed
    wandb_mode > a non-empty $WANDB_MODE > online if there is a key > offline

W&B itself checks only when training starts, after all the work on data, and then raises an error or waits for 90 s. So
the server of an online run is asked here, once and briefly. If it cannot be reached or refuses the key, the run is
offline. Imports no torch.
"""

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config.sections import TrackingSettings
from ..errors import ConfigError

TRACKIO, WANDB = "trackio", "wandb"
NAMES = ("none", TRACKIO, WANDB)
REPORT_TO = "POSTTRAIN_REPORT_TO"
MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}
PROBE_S = 10.0


@dataclass(frozen=True)
class Choice:
    """The chosen dashboards, and why."""

    sinks: tuple[str, ...]
    wandb_mode: str | None  # online | offline | disabled; None: W&B was not chosen
    why: str

    def __str__(self) -> str:
        named = [f"{WANDB} {self.wandb_mode}" if s == WANDB else s for s in self.sinks]
        return f"tracking: {', '.join(['metrics.jsonl', *named])} ({self.why})"


def choose(settings: TrackingSettings, environ: Mapping[str, str] | None = None) -> Choice:
    """Choose the dashboards. Asks W&B's server if the run would be online. Raises ConfigError."""
    environ = os.environ if environ is None else environ
    sinks, why = _choose_sinks(settings.report_to, environ)
    for name in sinks:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"report_to: {name} is not installed; run `pip install 'posttrain[{name}]'`")
    if WANDB not in sinks:
        return Choice(sinks, None, why)
    mode, mode_why = choose_wandb_mode(settings.wandb_mode, environ)
    return Choice(sinks, mode, f"{why}; {mode_why}")


def _choose_sinks(report_to: Any, environ: Mapping[str, str]) -> tuple[tuple[str, ...], str]:
    if report_to is not None:
        named, why, where = report_to, "report_to", "report_to"
    elif environ.get(REPORT_TO):
        named, why, where = environ[REPORT_TO], REPORT_TO, REPORT_TO
    elif importlib.util.find_spec(TRACKIO) is not None:
        return (TRACKIO,), "trackio is installed"
    else:
        return (), "no dashboard: `pip install 'posttrain[trackio]'` for a local one"
    words = [w.strip() for w in named.split(",")] if isinstance(named, str) else list(named)
    for word in words:
        if word not in NAMES:
            raise ConfigError(f"{where} must be one of {', '.join(NAMES)}, or a list of them, got {named!r}")
    if "none" in words and len(words) > 1:
        raise ConfigError(f"{where} is {named!r}: none cannot be combined with others; leave one of them out")
    return tuple(dict.fromkeys(w for w in words if w != "none")), why


def choose_wandb_mode(explicit: str | None, environ: Mapping[str, str]) -> tuple[str, str]:
    """W&B's mode, and why. Raises ConfigError for a WANDB_MODE that W&B does not know."""
    if explicit:
        mode, why = explicit, "wandb_mode"
    elif environ.get("WANDB_MODE"):
        word = environ["WANDB_MODE"]
        if word not in MODES:
            raise ConfigError(f"WANDB_MODE must be one of {', '.join(MODES)}, got {word!r}")
        mode, why = MODES[word], f"WANDB_MODE={word}"
    else:
        mode, why = "online", ""
    if mode != "online":
        return mode, why
    from .wandb_server import WandbServer

    server = WandbServer.configured()
    if server.auth is None:
        return "offline", f"{f'{why}, but ' if why else ''}{server.no_auth}"
    trouble = server.trouble(PROBE_S)
    if trouble:
        return "offline", f"{trouble}; `wandb sync` sends it later"
    return "online", why or f"a key for {server.url} was found"
