"""What a chain prints about a failed stage, from its processes' exit files, which no launcher changes."""

import os
import subprocess
import sys
import time

import pytest

from conftest import ROOT, actions
from posttrain.chain.run import _failure
from posttrain.errors import LaunchError
from posttrain.launch.exit_files import clear_state, read_reports

LAUNCHERS = (
    "\nTraceback (most recent call last):\n  launch.py\nsubprocess.CalledProcessError: returned exit status 1.\n"
)


@pytest.fixture
def ended(tmp_path):
    """Run code as a recipe's `main` on each rank, one after the other; return the chain's error."""
    state, log = tmp_path / "state", tmp_path / "sft.stderr"
    clear_state(state)
    log.write_text("# launched\nConfigError: of an earlier launch\n")

    def run(*bodies):
        begun = log.stat().st_size
        with log.open("a") as stderr:
            for rank, body in enumerate(bodies):
                code = f"from posttrain.errors import *\ndef main():\n    {body}\nrun_main(main)"
                env = {**os.environ, "POSTTRAIN_STATE": str(state), "RANK": str(rank), "WORLD_SIZE": str(len(bodies))}
                subprocess.run([sys.executable, "-c", code], env=env, stderr=stderr)
            stderr.write(LAUNCHERS)
        return _failure("sft", 1, log, begun, read_reports(state))

    return run


def test_a_user_error_is_shown_in_full_and_once(ended, capsys):
    error = ended(
        "raise DataError('two rows:\\n  row 1\\n  row 2')", "raise DataError('two rows:\\n  row 1\\n  row 2')"
    )
    assert isinstance(error, LaunchError)
    assert str(error) == "stage sft stopped:\nDataError: two rows:\n  row 1\n  row 2"
    assert capsys.readouterr().err == ""


def test_the_first_process_to_end_is_reported_as_the_cause(ended):
    error = ended("raise GateError('stops: 0')", "raise RuntimeError('Connection closed by peer')")
    assert str(error) == "stage sft stopped:\nGateError: stops: 0"


def test_a_crash_prints_the_end_of_its_traceback(ended, capsys):
    error = ended("raise TypeError('a bug,\\nin two lines')")
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback (most recent call last):\n")
    assert shown.endswith("TypeError: a bug,\nin two lines\n")
    assert "CalledProcessError" not in shown and "earlier launch" not in shown
    assert str(error).startswith("stage sft ended with exit code 1; its errors are in ")


def test_a_crash_without_a_message_is_reported(ended, capsys):
    ended("assert False")
    assert capsys.readouterr().err.endswith("AssertionError\n")


def test_a_killed_process_prints_the_end_of_this_launchs_stderr(ended, capsys):
    error = ended("import os, sys; print('loading', file=sys.stderr, flush=True); os.kill(os.getpid(), 9)")
    shown = capsys.readouterr().err
    assert shown.startswith("loading\n") and shown.endswith("returned exit status 1.\n")
    assert "ended with exit code 1" in str(error)


def test_a_launch_clears_the_exit_files_of_the_last_one(tmp_path):
    state = tmp_path / "logs" / "sft"
    clear_state(state)
    for name in ("stop", "exit-2.rank-0", "exit-75.rank-11"):
        (state / name).touch()
    (state / "notes.txt").touch()
    clear_state(state)
    assert [path.name for path in state.iterdir()] == ["notes.txt"]


def test_a_stage_that_is_asked_to_stop_saves_a_checkpoint_and_resumes(chain):
    runs = chain.parent / "runs"
    command = [sys.executable, "-m", "posttrain.cli", "run", str(chain)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    end = time.monotonic() + 120
    while not (runs / "sft" / "stage.json").is_file():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    (runs / ".logs" / "sft" / "stop").touch()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 85, out + err
    assert "StoppedError: stage sft stopped as asked, after step " in err
    assert list((runs / "sft" / "checkpoints").glob("checkpoint-*/written_by.json"))
    assert actions(chain)["sft"] == "resume"
