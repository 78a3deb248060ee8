"""Running a chain here: each stage that is not complete is launched, in order. Imports no torch.

<output_dir>/.logs/
  sft.stdout, sft.stderr    the stage's output, over all its launches
  sft/                      exit codes and messages of its last launch (`launch/exit_files.py`); a file `stop`
                            put here makes the stage save a checkpoint and end
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import EXIT_BUG, EXIT_STOPPED, STATE, ArtifactError, LaunchError, PosttrainError, StoppedError
from ..fileio import write_atomically
from ..launch import IN_CHAIN, build_command, die_with_parent, environment
from ..launch.exit_files import clear_state, read_reports
from ..runs.directory import lock
from ..runs.paths import LOGS, OWNER, PREVIOUS
from .graph import Chain, ChainStage, stage_arguments
from .plan import plan
from .summary import closing_table, result_line
from .view import Lines


def run(chain: Chain, *, only: str | None = None, dry_run: bool = False, view: Lines | None = None) -> None:
    """Run the stages that are not complete, in order, and print the closing table.

    `view` shows the running chain; the default is plain lines. Raises a PosttrainError at the first failure.
    """
    take_chain_directory(chain, write=not dry_run)
    plans = plan(chain, only)
    with Lines() if view is None or dry_run else view as shown:
        for p in plans:
            result = result_line(chain.run_dir(p.stage.name)) if p.action == "skip" else ""
            shown.planned(p.stage.name, p.action, p.reason, chain.run_dir(p.stage.name), result)
        if dry_run:
            return
        for number, p in enumerate(plans, 1):
            if p.action == "skip":
                continue
            if p.stale:
                move_aside(chain, p.stage.name)
            _run_stage(chain, p.stage, f"[{number}/{len(plans)} {p.stage.name}]", shown)
        width = shown.width
    print(
        closing_table(
            f"{chain.name}, in {chain.output_dir}", {s.name: chain.run_dir(s.name) for s in chain.stages}, width
        ),
        flush=True,
    )
    print(f"for an HTML page: posttrain report {chain.path}", flush=True)


def take_chain_directory(chain: Chain, *, write: bool = True) -> None:
    """Refuse an output directory that another chain owns. Raises ArtifactError."""
    owner = chain.output_dir / OWNER
    mine = {"name": chain.name, "file": str(chain.path.resolve())}
    if owner.is_file():
        theirs = json.loads(owner.read_text(encoding="utf-8"))
        if theirs.get("name") != chain.name:
            raise ArtifactError(
                f"output_dir: {chain.output_dir} belongs to the chain {theirs.get('name')!r} ({theirs.get('file')}); "
                f"set output_dir in {chain.path} to another folder"
            )
    elif chain.output_dir.is_dir() and any(chain.output_dir.iterdir()):
        raise ArtifactError(
            f"output_dir: {chain.output_dir} is not empty and was not made by a chain; choose another folder"
        )
    if write:
        chain.output_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(owner, json.dumps(mine) + "\n")


def move_aside(chain: Chain, name: str) -> None:
    """Move an outdated result to .previous/: nothing that was computed is deleted.

    Raises LaunchError if a process is training in it.
    """
    run_dir = chain.run_dir(name)
    lock(run_dir).close()
    target = chain.output_dir / PREVIOUS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    target.parent.mkdir(exist_ok=True)
    shutil.move(str(run_dir), str(target))
    print(f"kept the previous {name} as {target}", flush=True)


def state_folder(chain: Chain, name: str) -> Path:
    """The folder for the exit files and the file `stop` of a stage that is launched here."""
    return chain.output_dir / LOGS / name


def _run_stage(chain: Chain, stage: ChainStage, label: str, view: Lines) -> None:
    """Launch one stage; show and log its output. Raises its error if it fails."""
    command = build_command(stage.config.recipe, stage_arguments(chain, stage), stage.launch.accelerate_config)
    logs, state = chain.output_dir / LOGS, state_folder(chain, stage.name)
    clear_state(state)
    log = logs / f"{stage.name}.stderr"
    view.started(stage.name, label, f"accelerate launch {' '.join(command[3:])}", log)
    with log.open("a", encoding="utf-8") as stderr, (logs / f"{stage.name}.stdout").open("a", encoding="utf-8") as kept:
        stderr.write(f"# launched {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        stderr.flush()
        begun = log.stat().st_size  # output of earlier launches comes before it
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment(stage.launch.accelerate_config) | {IN_CHAIN: str(os.getpid()), STATE: str(state.resolve())},
            preexec_fn=die_with_parent,
        )
        assert process.stdout is not None
        for line in process.stdout:
            kept.write(line)
            kept.flush()
            view.line(stage.name, label, line)
        code = process.wait()
    view.ended(stage.name, result_line(chain.run_dir(stage.name)) if code == 0 else None)
    if code != 0:
        raise _failure(stage.name, code, log, begun, read_reports(state))


def _failure(name: str, code: int, log: Path, begun: int, reports: Sequence[Mapping[str, Any]]) -> PosttrainError:
    """The error of a stage that ended with `code`, by the reports of its processes.

    The earliest report is the cause: a process that fails takes the others with it. A user error is shown in full. For
    a crash the end of the traceback is printed. If there is no report (the process was killed, or the launcher failed),
    the end of the stage's stderr is printed, which begins at byte `begun` of `log`.
    """
    first: Mapping[str, Any] = reports[0] if reports else {"code": EXIT_BUG, "message": ""}
    same = dict.fromkeys(r["message"] for r in reports if r["code"] == first["code"] and r["message"])
    if first["code"] == EXIT_STOPPED and same:
        return StoppedError(f"stage {name} {first['message'].removeprefix('StoppedError: ')}")
    if first["code"] != EXIT_BUG and same:
        return LaunchError("\n".join([f"stage {name} stopped:", *same]))
    with log.open("rb") as file:
        file.seek(begun)
        text = file.read().decode("utf-8", errors="replace")
    # accelerate's launcher adds a traceback of its own below the one of the recipe.
    its_own, found, _ = text.rpartition(first["message"].rstrip(": ")) if first["message"] else (text, "", "")
    print("\n".join((its_own + found if found else text).splitlines()[-25:]), file=sys.stderr)
    return LaunchError(
        f"stage {name} ended with exit code {code}; its errors are in {log}. "
        "Finished stages and checkpoints are kept: run the same command again to resume."
    )
