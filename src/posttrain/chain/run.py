"""Running a chain here: each stage that is not complete is launched, in order. Imports no torch.

<output_dir>/.logs/
  sft.stdout, sft.stderr    what the stage printed, of all its launches
  sft/                      what the processes of its last launch ended with (`launch/exit_files.py`); a file `stop`
                            that somebody puts here has the stage save a checkpoint and end
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
    """Run what is not complete, in order, and print the closing table. Raises a PosttrainError at the first failure.

    `view` shows it while it runs; plain lines when it is left out.
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
    print(f"as a page: posttrain report {chain.path}", flush=True)


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
        raise ArtifactError(f"output_dir: {chain.output_dir} is not empty and no chain's; choose another folder")
    if write:
        chain.output_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(owner, json.dumps(mine) + "\n")


def move_aside(chain: Chain, name: str) -> None:
    """Keep an outdated result under .previous/: nothing that was paid for is deleted.

    Raises LaunchError when a process is training there.
    """
    run_dir = chain.run_dir(name)
    lock(run_dir).close()
    target = chain.output_dir / PREVIOUS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    target.parent.mkdir(exist_ok=True)
    shutil.move(str(run_dir), str(target))
    print(f"kept the previous {name} as {target}", flush=True)


def state_folder(chain: Chain, name: str) -> Path:
    """Where a stage that is launched here says what it ended with, and looks for a file `stop`."""
    return chain.output_dir / LOGS / name


def _run_stage(chain: Chain, stage: ChainStage, label: str, view: Lines) -> None:
    """Launch one stage; show its lines, keep them and its stderr, and end with its error when it fails."""
    command = build_command(stage.config.recipe, stage_arguments(chain, stage), stage.launch.accelerate_config)
    logs, state = chain.output_dir / LOGS, state_folder(chain, stage.name)
    clear_state(state)
    log = logs / f"{stage.name}.stderr"
    view.started(stage.name, label, f"accelerate launch {' '.join(command[3:])}", log)
    with log.open("a", encoding="utf-8") as stderr, (logs / f"{stage.name}.stdout").open("a", encoding="utf-8") as kept:
        stderr.write(f"# launched {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        stderr.flush()
        begun = log.stat().st_size  # earlier launches are kept before it
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
    """What a stage that ended with `code` ended with, by the reports of its processes.

    The first report is the cause: a process that fails takes the others with it. A message is shown whole; of a crash,
    the end of the traceback is printed here, and of a process that left no report (it was killed, or the launcher
    itself failed) the end of its stderr, which begins at byte `begun` of `log`.
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
        "Finished stages and checkpoints are kept: run the same command again to go on."
    )
