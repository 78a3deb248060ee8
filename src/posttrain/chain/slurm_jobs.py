"""A chain as Slurm jobs: one a stage, each after its inputs. What `posttrain submit` and `posttrain cancel` do.

    <output_dir>/.slurm/
      jobs.json          each stage's job
      sft.sbatch         its script
      sft/               job.log, node-N.log, rank-N.log, and what job and ranks tell each other

A stage that is complete is not submitted, nor is one that is waiting or running already. If one submission fails, those
before it are cancelled. Which job is whose is read from Slurm (each carries its stage's key and directory): an id in
jobs.json that now names another's job is refused. Imports no torch.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import LaunchError
from ..fileio import write_atomically
from ..launch import slurm
from ..launch.script import Job, render
from ..launch.settings import check_fit
from ..launch.slurm import JobInfo
from ..runs.paths import LOCK
from .graph import Chain, stage_arguments
from .plan import Plan, plan
from .run import move_aside, take_chain_directory

FOLDER = ".slurm"
JOBS = "jobs.json"


@dataclass(frozen=True)
class Step:
    """What `submit` does about one stage."""

    plan: Plan
    live: JobInfo | None  # a job that does it already
    note: str = ""

    @property
    def name(self) -> str:
        return self.plan.stage.name

    @property
    def submits(self) -> bool:
        return self.plan.action != "skip" and self.live is None


def folder_of(chain: Chain) -> Path:
    """Where the chain's scripts and logs are; absolute, since other machines read it."""
    return chain.output_dir.resolve() / FOLDER


def state_of(chain: Chain, stage: str) -> Path:
    """Where a stage's job keeps its logs, and what it and its ranks tell each other."""
    return folder_of(chain) / stage


def submit(chain: Chain, *, after: Sequence[str] = (), dry_run: bool = False) -> None:
    """Submit what is not complete; print the graph. A dry run writes the scripts and submits nothing.

    `after` are ids of other jobs that the first stages wait for. Raises a PosttrainError; then nothing is left queued.
    """
    for stage in chain.stages:
        check_fit(stage.launch, f"{chain.path}: stages.{stage.name}: launch")
    take_chain_directory(chain)
    folder_of(chain).mkdir(exist_ok=True)
    with _alone(chain):
        needed = [] if dry_run else _check_after(after)
        steps = _steps(chain, ask_slurm=not dry_run or slurm.answers())
        jobs = {step.name: _job(chain, step.plan) for step in steps if step.submits}
        print("\n".join([*_graph(steps, after), *_notes()]), flush=True)
        for step in steps:
            if step.submits and not dry_run:
                if step.plan.stale:
                    move_aside(chain, step.name)
                _clear(jobs[step.name].state)
        for job in jobs.values():
            write_atomically(job.script, render(job))
        if dry_run:
            print(f"\nnothing was submitted; the scripts are in {folder_of(chain)}", flush=True)
            return
        for job in jobs.values():
            slurm.test(job.script)
        _submit_all(chain, steps, jobs, needed)


@contextmanager
def _alone(chain: Chain) -> Iterator[None]:
    """Two submissions of one chain at a time would submit everything twice."""
    with (folder_of(chain) / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LaunchError(f"another `posttrain submit` of {chain.path} is at work") from error
        yield


def _check_after(ids: Sequence[str]) -> list[str]:
    """Those of `ids` that are still to be waited for. Raises LaunchError for one that can never end well."""
    needed = []
    for job_id in ids:
        info = slurm.show(job_id) if job_id.isdigit() else None
        if info is None:
            raise LaunchError(
                f"--after {job_id}: Slurm knows no such job (any more); it would take the dependency and start at once"
            )
        if info.alive:
            needed.append(job_id)
        elif info.state != "COMPLETED":
            raise LaunchError(f"--after {job_id}: that job ({info.name}) has ended as {info.state}")
    return needed


def _steps(chain: Chain, *, ask_slurm: bool) -> list[Step]:
    recorded = read_jobs(chain)
    live = slurm.find_all() if ask_slurm else {}
    steps = []
    for p in plan(chain):
        run_dir = chain.run_dir(p.stage.name).resolve()
        job_id = recorded.get(p.stage.name)
        note = ""
        if ask_slurm and job_id is not None and p.action != "skip":
            info = slurm.show(job_id)
            if info is None:
                note = f"job {job_id} is no longer known to Slurm"
            elif not slurm.is_of(info, run_dir):
                raise LaunchError(
                    f"{folder_of(chain) / JOBS}: job {job_id} of the stage {p.stage.name} is {info.name!r} of user "
                    f"{info.user}, not this chain's; take it out of that file"
                )
        mine = [found for found, text in live.items() if text.endswith(f":{run_dir}")]
        info = slurm.show(mine[0]) if mine else None
        if info is not None and info.comment != slurm.comment(p.key, run_dir):
            raise LaunchError(
                f"stage {p.stage.name}: its job {info.id} is {info.state} with another configuration; "
                f"`posttrain cancel {chain.path}` first, or wait for it"
            )
        steps.append(Step(p, info, note))
    return steps


def _graph(steps: Sequence[Step], after: Sequence[str]) -> list[str]:
    """One line a stage: what is done about it, why, on what, and after which."""
    lines = []
    submitted = {step.name for step in steps if step.plan.action != "skip"}
    for step in steps:
        stage, launch = step.plan.stage, step.plan.stage.launch
        assert launch.slurm is not None
        action = "submit" if step.submits else "queued" if step.live else "skip"
        parents = [parent for parent in dict.fromkeys(stage.parents.values()) if parent in submitted]
        waits = [*parents, *([] if parents else (f"job {job_id}" for job_id in after))]
        reason = f"job {step.live.id}, {step.live.state}" if step.live else step.plan.reason
        if step.note:
            reason += f"; {step.note}"
        nodes = f"{launch.slurm.nodes} x {launch.slurm.gpus_per_node or 'no'} GPUs, {launch.accelerate_config.name}"
        lines.append(
            f"{action:>6}  {stage.name:<12} {reason}; {nodes}" + (f"; after {', '.join(waits)}" if waits else "")
        )
    return lines


def _notes() -> list[str]:
    """What of the user's environment is not followed."""
    dropped = [name for name in slurm.clean_environment(os.environ)[1] if name.startswith("SBATCH_")]
    return [f"note: {', '.join(dropped)} would overrule the scripts, and is left out"] if dropped else []


def _job(chain: Chain, p: Plan) -> Job:
    stage = p.stage
    return Job(
        chain=chain.name,
        stage=stage.name,
        key=p.key,
        recipe=stage.config.recipe,
        arguments=stage_arguments(chain, stage),
        launch=stage.launch,
        run_dir=chain.run_dir(stage.name).resolve(),
        state=state_of(chain, stage.name),
        script=folder_of(chain) / f"{stage.name}.sbatch",
        cwd=Path.cwd(),
    )


def _clear(state: Path) -> None:
    """A new submission counts failures anew; logs are kept, and added to."""
    state.mkdir(exist_ok=True)
    for path in (*state.glob("exit-*"), *(state / name for name in ("stop", "overdue", "failures", "progress"))):
        path.unlink(missing_ok=True)


def _submit_all(chain: Chain, steps: Sequence[Step], jobs: Mapping[str, Job], needed: Sequence[str]) -> None:
    before, ids = read_jobs(chain), {step.name: step.live.id for step in steps if step.live is not None}
    new: list[str] = []
    try:
        for step in steps:
            if not step.submits:
                continue
            parents = list(dict.fromkeys(ids[p] for p in step.plan.stage.parents.values() if p in ids))
            job_id = slurm.submit(jobs[step.name].script, parents=parents or needed)
            new.append(job_id)
            ids[step.name] = job_id
            _verify(job_id, jobs[step.name])
            write_jobs(chain, {**before, **ids})
    except BaseException:
        slurm.cancel(new)
        write_jobs(chain, before)
        raise
    for name, job_id in ids.items():
        print(f"{name}: job {job_id}", flush=True)
    print(f"`posttrain status {chain.path}` shows how they fare; logs are in {folder_of(chain)}", flush=True)


def _verify(job_id: str, job: Job) -> None:
    """The id that sbatch gave is this stage's job, and it can start some day. Raises LaunchError."""
    info = slurm.show(job_id)
    if info is None or not slurm.is_of(info, job.run_dir):
        raise LaunchError(f"sbatch gave {job_id} for {job.name}, and that is not its job ({info and info.name})")
    if info.hopeless:
        raise LaunchError(f"stage {job.stage}: Slurm would let it wait for ever: {info.reason.replace('_', ' ')}")


def cancel(chain: Chain) -> None:
    """Cancel the chain's waiting and running jobs, found by what they carry."""
    live = slurm.find_all()
    found: dict[str, str] = {}
    for stage in chain.stages:
        run_dir = chain.run_dir(stage.name).resolve()
        found |= {job_id: stage.name for job_id, text in live.items() if text.endswith(f":{run_dir}")}
    slurm.cancel(list(found))
    for job_id, name in found.items():
        print(f"{name}: job {job_id} cancelled")
    if not found:
        print(f"{chain.name}: no job is waiting or running")


def read_jobs(chain: Chain) -> dict[str, str]:
    """The id of each stage's last job. Raises LaunchError for a damaged file."""
    path = folder_of(chain) / JOBS
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): str(job_id) for name, job_id in document.items()}
    except (json.JSONDecodeError, AttributeError, UnicodeDecodeError) as error:
        raise LaunchError(f"{path} is damaged ({error}); delete it: jobs are found without it too") from error


def write_jobs(chain: Chain, jobs: Mapping[str, str]) -> None:
    write_atomically(folder_of(chain) / JOBS, json.dumps(jobs, indent=2) + os.linesep)
