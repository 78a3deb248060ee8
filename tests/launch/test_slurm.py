"""Parsing `scontrol show job`: values hold blanks and `=`, and the keys differ between versions."""

from pathlib import Path

import pytest

from posttrain.launch.slurm import clean_environment, comment, is_of, parse

# Output of Slurm 22.05, shortened; the comment and the name contain text that looks like a key.
PENDING = (
    "JobId=7 JobName=my chain/sft UserId=root(0) GroupId=root(0) MCS_label=N/A Priority=1 JobState=PENDING "
    "Reason=Job's_account_not_known,_so_it_can't_use_this_partition_(members_allows_lab) "
    "Dependency=afterok:6(unfulfilled) Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0 RunTime=00:01:00 "
    "TimeLimit=UNLIMITED TimeMin=N/A NodeList= NumNodes=2 NumCPUs=4 WorkDir=/home/a=b/x "
    "Comment=posttrain:aaaaaaaaaaaa:/scratch/my runs/k=v/sft  StdErr=/x/job.log Power= "
)
RUNNING = (
    "JobId=8 JobName=c/dpo UserId=nobody(65534) GroupId=x(1) JobState=RUNNING Reason=None Dependency=(null) Requeue=1 "
    "Restarts=0 BatchFlag=1 ExitCode=2:0 RunTime=00:01:00 TimeLimit=01:00:00 TimeMin=N/A NodeList=n[1-2] BatchHost=n1 "
    "NumNodes=2 Comment=posttrain:aaaaaaaaaaaa:/scratch/my runs/k=v/sft StdErr=/x TresPerNode=gres:gpu:2"
)


def test_values_with_blanks_and_equals_signs_are_parsed():
    job, other = parse(f"{PENDING}\n{RUNNING}\n")
    assert (job.id, job.name, job.user, job.state, job.restarts) == ("7", "my chain/sft", "root", "PENDING", 2)
    assert (job.nodes, job.dependency, job.exit_code) == ("", "afterok:6(unfulfilled)", "0:0")
    assert job.comment == comment("a" * 64, Path("/scratch/my runs/k=v/sft"))
    assert (other.nodes, other.state, other.exit_code, other.dependency) == ("n[1-2]", "RUNNING", "2:0", "")


def test_a_job_is_recognised_by_user_and_directory():
    job, other = parse(f"{PENDING}\n{RUNNING}\n")
    where = Path("/scratch/my runs/k=v/sft")
    assert is_of(job, where) == (job.user == "root")
    assert not is_of(job, Path("/scratch/my runs/k=v/dpo"))
    assert not is_of(other, where)  # another user's


@pytest.mark.parametrize(
    ("reason", "hopeless"),
    [("Dependency", False), ("Resources", False), ("PartitionDown", False), ("DependencyNeverSatisfied", True),
     ("InvalidAccount", True), ("PartitionTimeLimit", True), ("BadConstraints", True)],
)  # fmt: skip
def test_reasons_that_never_end_are_hopeless(reason, hopeless):
    assert parse(PENDING)[0].hopeless
    (job,) = parse(
        PENDING.replace("Job's_account_not_known,_so_it_can't_use_this_partition_(members_allows_lab)", reason)
    )
    assert job.hopeless == hopeless


def test_sbatch_and_slurm_variables_are_removed_from_the_environment():
    kept, dropped = clean_environment(
        {"SBATCH_PARTITION": "other", "SLURM_JOB_ID": "3", "SLURM_CONF": "/x", "HOME": "/home/ada"}
    )
    assert kept == {"SLURM_CONF": "/x", "HOME": "/home/ada"}
    assert dropped == ["SBATCH_PARTITION", "SLURM_JOB_ID"]
