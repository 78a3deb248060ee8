"""Python processes for the tests that start within milliseconds: forked from one that has imported torch, TRL and PEFT.

    command = [forked.python(), "recipes/sft.py", "--config", ...]     as [sys.executable, ...] is

`python()` is an executable that takes what an interpreter takes. It hands arguments, environment, working directory and
standard streams to the server (server.py), which forks a process and runs the script there as `__main__`: with its
own process id, exit code and signals. A process started so starts others in the same way, so that `posttrain run`,
`accelerate launch` below it and the recipe below that are three processes, as they are elsewhere.

What depends on the start itself is left to a new interpreter: `-c`, other modules, an environment in which a variable
that is read at import differs, and every process while coverage is measured.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
SESSION = "POSTTRAIN_FORK_SERVER"  # PID:FOLDER of a test session, whose workers share one server
START_S = 300


def open_session() -> None:
    """Name the server's folder for this session and its workers. It is started when it is needed first."""
    if SESSION not in os.environ:
        folder = tempfile.mkdtemp(prefix="posttrain-fork-")
        os.environ[SESSION] = f"{os.getpid()}:{folder}"


def close_session() -> None:
    """Remove the folder, in the process that has opened the session. The server ends with that process."""
    owner, folder = os.environ[SESSION].split(":", 1)
    if int(owner) == os.getpid():
        shutil.rmtree(folder)
        del os.environ[SESSION]


def python() -> str:
    """The executable to use as `sys.executable`; the interpreter itself where nothing can be forked."""
    if "POSTTRAIN_TEST_GPU" in os.environ or "COVERAGE_PROCESS_CONFIG" in os.environ or sys.platform != "linux":
        return sys.executable  # CUDA and coverage's tracer do not go through a fork
    owner, name = os.environ[SESSION].split(":", 1)
    folder = Path(name)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "ready").exists():
            _start(folder, owner)
    return str(folder / "bin" / "python")


def _start(folder: Path, owner: str) -> None:
    """Write the executable and start the server. It ends when the process that owns the session does."""
    real = Path(sys.executable)
    (folder / "bin").mkdir()
    for program in real.parent.iterdir():  # posttrain puts the interpreter's folder on PATH: ninja is there
        if not program.name.startswith("python"):
            (folder / "bin" / program.name).symlink_to(program)
    client = folder / "bin" / "python"
    source = (HERE / "client.py").read_text(encoding="utf-8")
    client.write_text(f"#!{real} -IS\nREAL, SOCKET = {str(real)!r}, {str(folder / 'socket')!r}\n{source}")
    client.chmod(0o755)
    # pyarrow's allocator would start a thread, and of several threads only one is there after a fork.
    environment = {**os.environ, "JE_ARROW_MALLOC_CONF": "background_thread:false"}
    room = "-" * 16384  # where a forked process writes its own command line
    command = [str(real), str(HERE / "server.py"), str(folder), owner, room]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    begun = time.monotonic()
    while not (folder / "ready").exists():
        if server.poll() is not None or time.monotonic() - begun > START_S:
            raise RuntimeError(f"the fork server did not start:\n{(folder / 'log').read_text()[-3000:]}")
        time.sleep(0.05)
