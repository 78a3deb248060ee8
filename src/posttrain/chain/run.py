"""Running a chain here: each stage that is not complete is launched, in order. Imports no torch."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence

from ..errors import EXIT_USER_ERROR, ArtifactError, LaunchError
from ..fileio import write_atomically
from ..launch import IN_CHAIN, build_command, die_with_parent, environment
from ..runs.directory import lock
from .graph import Chain, ChainStage, stage_arguments
from .plan import plan
from .summary import closing_table, result_line
from .view import Lines

_OWNER = "chain.json"


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
    owner = chain.output_dir / _OWNER
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
    target = chain.output_dir / ".previous" / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    target.parent.mkdir(exist_ok=True)
    shutil.move(str(run_dir), str(target))
    print(f"kept the previous {name} as {target}", flush=True)


def _run_stage(chain: Chain, stage: ChainStage, label: str, view: Lines) -> None:
    """Launch one stage; show its lines, keep them and its stderr, and end with its error when it fails."""
    command = build_command(stage.config.recipe, stage_arguments(chain, stage), stage.launch.accelerate_config)
    logs = chain.output_dir / ".logs"
    logs.mkdir(exist_ok=True)
    log = logs / f"{stage.name}.stderr"
    view.started(stage.name, label, f"accelerate launch {' '.join(command[3:])}", log)
    with log.open("a", encoding="utf-8") as stderr, (logs / f"{stage.name}.stdout").open("a", encoding="utf-8") as kept:
        stderr.write(f"{LAUNCHED}{time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        stderr.flush()
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment(stage.launch.accelerate_config) | {IN_CHAIN: str(os.getpid())},
            preexec_fn=die_with_parent,
        )
        assert process.stdout is not None
        for line in process.stdout:
            kept.write(line)
            kept.flush()
            view.line(stage.name, label, line)
        code = process.wait()
    view.ended(stage.name, result_line(chain.run_dir(stage.name)) if code == 0 else None)
    if code == 0:
        return
    tail = last_launch(log.read_text(encoding="utf-8", errors="replace").splitlines())
    named = [line for line in tail if line.split(":")[0].endswith("Error") and not line.startswith(_LAUNCHERS_OWN)]
    last = len(tail) - 1 - tail[::-1].index(named[-1]) if named else 0
    shown = "\n".join(tail[last:][:25]) if named else "\n".join(tail[-15:])
    if code == EXIT_USER_ERROR or (named and named[-1].split(":")[0] in _OUR_ERRORS):
        raise LaunchError(f"stage {stage.name} stopped:\n{_without_launcher(shown)}")
    print(shown, file=sys.stderr)
    raise LaunchError(
        f"stage {stage.name} ended with exit code {code}; its errors are in {log}. "
        "Finished stages and checkpoints are kept: run the same command again to go on."
    )


_LAUNCHERS_OWN = "subprocess.CalledProcessError"
_OUR_ERRORS = {"ConfigError", "DataError", "ArtifactError", "LaunchError", "GateError", "UnreachableError"}


def _without_launcher(text: str) -> str:
    """Drop the traceback that accelerate's launcher adds below a recipe's own message."""
    return text.split("\nTraceback (most recent call last)")[0]


LAUNCHED = "# launched "  # in a stage's stderr, which is added to


def last_launch(lines: Sequence[str]) -> list[str]:
    """What a stage's stderr says of its last launch; the file keeps those of earlier ones."""
    starts = [number for number, line in enumerate(lines) if line.startswith(LAUNCHED)]
    return list(lines[starts[-1] + 1 :] if starts else lines)
