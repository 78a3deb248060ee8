"""Sends what a stage reports to its record, and from there to the dashboards.

The record is written first; an error there ends the stage. A dashboard that fails is dropped with one message, and
training continues. A resumed stage continues its run: each dashboard says which step it has, and gets what it lacks
from the record, then what is new. So a kill leaves no gap, and no step is sent twice.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ..config.sections import TrackingSettings
from ..log import log_line
from ..redact import redact, redact_values
from ..runs.lineage import Lineage
from ..runs.paths import ALERTS, COMPLETIONS, METRICS
from ..runs.record import Record, read_records
from .identity import Identity
from .select import TRACKIO, WANDB, Choice

COMPLETIONS_TABLE = "samples/completions"
ANSWERS_TABLE = "samples/answers"
_ABOUT = ("step", "max_steps", "epoch", "time", "left_s")


class Sink(Protocol):
    """A run in one dashboard."""

    name: str
    last_step: int  # the last step that it has; -1 if none
    later: str  # how a person can send what is missing; empty if there is no way

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def log_table(self, name: str, rows: list[dict[str, Any]], step: int) -> None: ...

    def alert(self, title: str, text: str, step: int) -> None: ...

    def update_config(self, config: Mapping[str, Any]) -> None: ...

    def log_lineage(self, lineage: Lineage) -> None: ...

    def finish(self) -> None: ...


class Tracker:
    """The record of a stage and its chosen dashboards. Only rank 0 has one."""

    def __init__(self, identity: Identity, choice: Choice, settings: TrackingSettings) -> None:
        self.identity, self.choice, self.settings = identity, choice, settings
        self.record = Record(identity.run_dir)
        self.sinks: list[Sink] = []
        self.begun: dict[str, int] = {}  # sink -> its last step when it was opened
        self.last_step = 0
        self.started = False

    # A run

    def start(self, config: Mapping[str, Any], resumed_step: int) -> None:
        """Open the dashboards, once, and send what they lack. `config` is the run's config, redacted here."""
        if self.started:
            return
        self.started = True
        self.record.resume(resumed_step)
        self.last_step = resumed_step
        self._open(config)
        for sink in list(self.sinks):
            self._guard(sink, self._catch_up)

    def _open(self, config: Mapping[str, Any]) -> None:
        for name in self.choice.sinks:
            try:
                sink = self._make(name, redact_values(config))
            except Exception as error:  # noqa: BLE001  whatever a dashboard's client raises, training goes on
                log_line(f"{name}: not started, training continues without it ({_words(error)})")
                continue
            if sink is not None:
                self.sinks.append(sink)
                self.begun[sink.name] = sink.last_step

    def _make(self, name: str, config: dict[str, Any]) -> Sink | None:
        if name == TRACKIO:
            from .trackio_sink import TrackioSink

            return TrackioSink(self.identity, config, self.settings)
        assert name == WANDB, name
        if self.choice.wandb_mode == "disabled":
            return None
        from .wandb_sink import WandbSink

        return WandbSink(self.identity, config, self.settings, str(self.choice.wandb_mode))

    def _catch_up(self, sink: Sink) -> None:
        """Send a dashboard the steps of the record that it lacks."""
        run_dir, rows = self.identity.run_dir, []
        for order, name in enumerate((METRICS, COMPLETIONS, ALERTS)):
            rows += [(r["step"], order, r) for r in read_records(run_dir / name) if r["step"] > sink.last_step]
        drawn: dict[int, list[dict[str, Any]]] = {}
        for step, order, record in sorted(rows, key=lambda row: row[:2]):
            values = {k: v for k, v in record.items() if k not in _ABOUT}
            if order == 0:
                sink.log(values, step)
            elif order == 1:
                drawn.setdefault(step, []).append(values)
                if len(drawn[step]) == sum(1 for s, o, _ in rows if (s, o) == (step, 1)):
                    sink.log_table(COMPLETIONS_TABLE, drawn[step], step)
            else:
                sink.alert(record["title"], record["text"], step)

    # During training

    def log(self, metrics: Mapping[str, Any], step: int, **about: Any) -> None:
        """Report the numbers of one log."""
        self.last_step = step
        self.record.log(metrics, step, **about)
        numbers = {k: v for k, v in metrics.items() if isinstance(v, (int, float))}
        self._each(lambda sink: sink.log(numbers, step), step)

    def log_completions(self, rows: list[dict[str, Any]], step: int) -> None:
        """Report sampled completions, each with its prompt, completion and scores."""
        rows = [redact_values(row) for row in rows]
        self.record.log_completions(rows, step)
        self._each(lambda sink: sink.log_table(COMPLETIONS_TABLE, rows, step), step)

    def alert(self, title: str, text: str, step: int) -> None:
        """Report a problem that has just begun."""
        text = redact(text)
        self.record.alert(title, text, step)
        self._each(lambda sink: sink.alert(title, text, step), step)

    # Its end

    def finish(self, lineage: Lineage, *, final: Mapping[str, float], answers: list[dict[str, Any]]) -> None:
        """Report final numbers, answers, cost and lineage, and end the run."""
        step = self.last_step
        if final:
            self.record.log(final, step)

        def close(sink: Sink) -> None:
            if final:
                sink.log(final, step)
            if answers:
                sink.log_table(ANSWERS_TABLE, [redact_values(row) for row in answers], step)
            sink.update_config({"measured": {**lineage.cost, "digest": lineage.digest}})
            sink.log_lineage(lineage)
            sink.finish()

        self._each(close)
        self.sinks = []

    def _each(self, act: Callable[[Sink], None], step: int | None = None) -> None:
        """Call `act` on each dashboard; with `step`, only on those that do not have that step yet."""
        for sink in list(self.sinks):
            if step is None or step > self.begun[sink.name]:
                self._guard(sink, act)

    def _guard(self, sink: Sink, act: Callable[[Sink], None]) -> None:
        try:
            act(sink)
        except Exception as error:  # noqa: BLE001  whatever a dashboard's client raises, training goes on
            self.sinks.remove(sink)
            words = f"dropped at step {self.last_step}, training continues without it ({_words(error)})"
            log_line(f"{sink.name}: {words}" + (f"; {sink.later}" if sink.later else ""))


def _words(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return redact(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)
