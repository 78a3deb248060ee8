"""Importing `PPOTrainer` loads what it trains with, and no part of the pipeline around it."""

import subprocess
import sys

MOST = 25
AROUND = ("config", "runs", "launch", "chain", "tracking", "training", "report", "demo")


def test_the_trainer_loads_few_modules_and_none_of_the_pipeline():
    code = (
        "import sys; from posttrain.ppo import PPOTrainer; "
        "print(*(name for name in sys.modules if name.split('.')[0] == 'posttrain'))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "posttrain.ppo.trainer" in loaded
    assert len(loaded) <= MOST, sorted(loaded)
    assert not [name for name in loaded if name.split(".")[1:2] and name.split(".")[1] in AROUND]


def test_names_of_adapters_are_imported_when_asked_for():
    code = (
        "import sys, posttrain.adapters as adapters; assert 'posttrain.adapters.start' not in sys.modules; "
        "print(*(getattr(adapters, name).__class__.__name__ for name in adapters.__all__)); "
        "assert adapters.load_policy is sys.modules['posttrain.adapters.start'].load_policy; "
        "assert not hasattr(adapters, 'no_such_name')"
    )
    kinds = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(kinds) == {"function", "str"}
