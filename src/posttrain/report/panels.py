"""Which metrics are drawn together, by recipe. A panel whose metrics a log does not have is left out."""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Panel:
    """A chart of metrics over steps. `metrics` are names or patterns, drawn in this order; `unit` names the axis."""

    title: str
    metrics: tuple[str, ...]
    unit: str = ""

    def find(self, names: Iterable[str]) -> list[str]:
        """The metrics of a log that belong here."""
        known = list(names)
        found = [sorted(n for n in known if fnmatchcase(n, pattern)) for pattern in self.metrics]
        return list(dict.fromkeys(name for several in found for name in several))


_LOSS = Panel("Loss", ("loss", "eval_loss"))
_GRADIENT = Panel("Gradient norm", ("grad_norm",))

_SPEED = (
    Panel("Tokens a second", ("perf/tokens_per_s",)),
    Panel("Of the machine's peak", ("perf/mfu",), "percent"),
    Panel("Where the seconds go", ("time/*",), "s a log"),
    Panel("Memory", ("memory/*",), "GiB"),
)

PANELS: dict[str, tuple[Panel, ...]] = {
    "sft": (
        _LOSS,
        Panel("Tokens predicted right", ("mean_token_accuracy", "eval_mean_token_accuracy"), "share"),
        Panel("Entropy", ("entropy", "eval_entropy"), "nats a token"),
        _GRADIENT,
    ),
    "reward": (
        _LOSS,
        Panel("Pairs ranked right", ("accuracy", "eval_accuracy"), "share"),
        Panel("Margin of chosen over rejected", ("margin", "eval_margin"), "score"),
        Panel("Scores in a batch", ("max_reward", "mean_reward", "min_reward"), "score"),
        _GRADIENT,
    ),
    "dpo": (
        _LOSS,
        Panel("DPO margin", ("rewards/margins", "eval_rewards/margins"), "implicit reward"),
        Panel("Implicit rewards", ("rewards/chosen", "rewards/rejected"), "implicit reward"),
        Panel("Pairs ranked right", ("rewards/accuracies", "eval_rewards/accuracies"), "share"),
        Panel("Log-probabilities", ("logps/chosen", "logps/rejected"), "nats a completion"),
        _GRADIENT,
    ),
    "ppo": (
        Panel("Reward", ("objective/scores", "eval_objective/scores"), "score"),
        Panel("KL from the reference", ("objective/kl", "eval_objective/kl"), "nats a completion"),
        Panel("Entropy", ("objective/entropy",), "nats a token"),
        Panel("Completion length", ("completions/mean_length",), "tokens"),
        Panel("Completions that stop", ("completions/stopped",), "share"),
        Panel("Returns explained by the critic", ("value/explained_variance",), "share of variance"),
        Panel("Losses", ("loss/policy", "loss/value")),
        Panel("Clipped tokens", ("policy/clip_fraction", "value/clip_fraction"), "share"),
        Panel("Each reward", ("rewards/*",), "score"),
    ),
    "ner": (
        _LOSS,
        Panel("Entity F1 on validation", ("eval_f1", "eval_f1_*"), "F1"),
        Panel("Precision and recall", ("eval_precision", "eval_recall"), "share"),
        _GRADIENT,
    ),
}  # fmt: skip

# Joined in one chart: how much reward was bought with how much KL.
KL, REWARD = "objective/kl", "objective/scores"


def panels_of(recipe: str) -> tuple[Panel, ...]:
    return PANELS.get(recipe, ()) and (*PANELS[recipe], *_SPEED)


def is_plotted(recipe: str, metric: str) -> bool:
    """Whether a recipe's charts want this metric."""
    return any(fnmatchcase(metric, pattern) for panel in panels_of(recipe) for pattern in panel.metrics)
