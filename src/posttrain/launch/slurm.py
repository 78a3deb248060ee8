"""Slurm's own commands: sbatch, squeue, scontrol, scancel. No accounting database is needed.

Each function returns values, or raises LaunchError with Slurm's message.
"""

import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import LaunchError

# States in `scontrol show job` of a job that has not ended.
ALIVE = {"PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "RESIZING",
         "SIGNALING", "STAGE_OUT", "STOPPED", "REQUEUE_FED", "SPECIAL_EXIT", "PREEMPTED"}  # fmt: skip

# Reasons for which a job would wait forever.
_NEVER = re.compile(
    r"account|Partition(NodeLimit|TimeLimit)|BadConstraints|Invalid(Account|QOS)|ReqNodeNotAvail.*Invalid|"
    r"AccountNotAllowed|QOSNotAllowed|AssocMax\w*PerJob|QOSMax\w*PerJob|DependencyNeverSatisfied",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class JobInfo:
    """One job, as Slurm describes it."""

    id: str
    name: str
    user: str
    state: str  # PENDING, RUNNING, COMPLETED, FAILED, ...
    reason: str
    restarts: int
    nodes: str  # as Slurm writes them: n[1-2]
    exit_code: str  # "2:0": exit code and signal
    run_time: str
    time_limit: str
    dependency: str
    comment: str

    @property
    def alive(self) -> bool:
        return self.state in ALIVE

    @property
    def hopeless(self) -> bool:
        """Whether it would wait forever."""
        return self.state == "PENDING" and _NEVER.search(self.reason) is not None


def submit(script: Path, *, parents: Sequence[str]) -> str:
    """Submit a script that starts after its parents; return the job's id. Raises LaunchError with sbatch's message."""
    command = ["sbatch", "--parsable"]
    if parents:
        command += [f"--dependency=afterok:{':'.join(parents)}", "--kill-on-invalid-dep=yes"]
    answer = _call([*command, str(script)]).strip()
    job_id = answer.split(";")[0]  # `id;cluster` in a federation
    if not job_id.isdigit():
        raise LaunchError(f"sbatch answered {answer!r} where the id of a job was expected")
    return job_id


def test(script: Path) -> None:
    """Ask Slurm whether it would take a script, without submitting it. Raises LaunchError with its message."""
    _call(["sbatch", "--test-only", str(script)])


def show(job_id: str) -> JobInfo | None:
    """A job as Slurm describes it; None if Slurm does not know it (any more)."""
    done = _run(["scontrol", "-o", "show", "job", job_id])
    if done.returncode != 0:
        if "Invalid job id" in done.stderr:
            return None
        raise LaunchError(f"scontrol show job {job_id}: {_said(done)}")
    found = parse(done.stdout)
    return found[0] if found else None


def parse(text: str) -> list[JobInfo]:
    """The jobs in the output of `scontrol -o show job`. Values may hold blanks and `=`, so keys are searched."""
    return [_parse_line(line) for line in text.splitlines() if line.startswith("JobId=")]


def _parse_line(line: str) -> JobInfo:
    def get(key: str, until: str) -> str:
        found = re.search(rf"(?:^| ){key}=(.*?) {until}=", line)
        return found[1] if found else ""

    return JobInfo(
        id=get("JobId", r"(?:ArrayJobId|HetJobId|JobName)"),
        name=get("JobName", "UserId"),
        user=get("UserId", "GroupId").split("(")[0],
        state=get("JobState", "Reason"),
        reason=get("Reason", "Dependency"),
        restarts=int(get("Restarts", "BatchFlag") or 0),
        nodes=get("NodeList", r"(?:BatchHost|NumNodes)").replace("(null)", ""),
        exit_code=get("ExitCode", r"\S+"),
        run_time=get("RunTime", "TimeLimit"),
        time_limit=get("TimeLimit", "TimeMin"),
        dependency=get("Dependency", "Requeue").replace("(null)", ""),
        comment=get("Comment", r"[A-Z]\w*").strip(),
    )


def comment(key: str, run_dir: Path) -> str:
    """The comment of a stage's job, which identifies it: a new cluster gives the same ids again."""
    return f"posttrain:{key[:12]}:{run_dir}"


def is_of(job: JobInfo, run_dir: Path) -> bool:
    """Whether a job belongs to this user and to the stage with this run directory."""
    return job.user == _me() and job.comment.endswith(f":{run_dir}") and job.comment.startswith("posttrain:")


def find_all() -> dict[str, str]:
    """The comments of this user's waiting and running jobs, by id."""
    rows = _call(["squeue", "--noheader", f"--user={_me()}", "--format=%i|%k"]).splitlines()
    return {job_id: comment.strip() for job_id, _, comment in (row.partition("|") for row in rows)}


def _me() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def cancel(job_ids: Sequence[str]) -> None:
    """Cancel jobs. Raises LaunchError with scancel's message."""
    if job_ids:
        _call(["scancel", *job_ids])


def clean_environment(environ: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The environment for Slurm's commands, and the names that were removed from it.

    SBATCH_* would overrule the script's own lines. SLURM_* belong to the job in which `submit` is called, if any.
    """
    dropped = [name for name in environ if name.startswith(("SBATCH_", "SLURM_")) and name != "SLURM_CONF"]
    return {k: v for k, v in environ.items() if k not in dropped}, sorted(dropped)


def answers() -> bool:
    """Whether there is a cluster that answers; a dry run does not need one."""
    return shutil.which("squeue") is not None and _run(["scontrol", "ping"]).returncode == 0


def _call(command: Sequence[str]) -> str:
    done = _run(command)
    if done.returncode != 0:
        raise LaunchError(f"{' '.join(command[:-1])} {Path(command[-1]).name}: {_said(done)}")
    return done.stdout


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    if shutil.which(command[0]) is None:
        raise LaunchError(
            f"{command[0]} is not on this machine's PATH: submit from a login node of a Slurm cluster, or run the "
            "chain here with `posttrain run`"
        )
    environ, _ = clean_environment(os.environ)
    try:
        return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=120)
    except subprocess.TimeoutExpired as error:
        raise LaunchError(
            f"{command[0]}: Slurm has not answered for 120 s; is slurmctld up? (`scontrol ping`)"
        ) from error


def _said(done: subprocess.CompletedProcess[str]) -> str:
    """The error message of a command, on one line."""
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return "; ".join(line.removeprefix("sbatch: error: ") for line in lines) or f"exit code {done.returncode}"
