"""Build DeepSpeed's extensions ahead: `make extensions`, or `python -m posttrain.distributed.deepspeed_build`.

    deepspeed_shm_comm    communication between processes on one CPU
    cpu_adam              optimizer steps on the CPU, for offloaded optimizer states

DeepSpeed would compile them when it first needs them, minutes into a launch. torch keeps a file `lock` beside a build;
if a build is killed, the lock stays and every later run waits for it silently and forever (torch 2.13,
`FileBaton.wait`).
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ..errors import LaunchError
from ..log import log_line

FOLDER = Path(sys.prefix) / "torch_extensions"
WAIT_S = 300
_QUIET_S = 15  # a lock is stale if nothing beside it has changed for this long and no compiler works there


def use() -> None:
    """Make DeepSpeed find the extensions built ahead and this environment's ninja, and remove stale locks.

    A TORCH_EXTENSIONS_DIR that the user has set is kept. Raises LaunchError when another process compiles for too long.
    """
    if FOLDER.is_dir():
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(FOLDER))
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        free(Path(os.environ["TORCH_EXTENSIONS_DIR"]))
    here = str(Path(sys.executable).parent)
    if here not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = f"{here}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def free(folder: Path, *, wait_s: float = WAIT_S) -> None:
    """Wait up to `wait_s` seconds for builds that run in `folder`, and delete the locks of those that do not run.

    A build runs while a compiler works there, or a file there has just changed. Raises LaunchError when time is up.
    """
    end = time.monotonic() + wait_s
    for lock in sorted(folder.glob("**/lock")):
        while lock.exists():
            if not _is_alive(lock.parent):
                lock.unlink(missing_ok=True)
                log_line(
                    f"note: deleted {lock}, left by an interrupted build, which would have blocked this run forever"
                )
            elif time.monotonic() > end:
                raise LaunchError(
                    f"{lock}: another process has been compiling there for {wait_s:g} s; wait for it, or end it and "
                    "run `make extensions`"
                )
            else:
                time.sleep(0.5)


def _is_alive(folder: Path) -> bool:
    import psutil

    try:
        changed = max(file.stat().st_mtime for file in (folder, *folder.iterdir()))
    except FileNotFoundError:  # it ended just now
        return True
    if time.time() - changed < _QUIET_S:
        return True
    for process in psutil.process_iter(["cwd"]):
        if process.info["cwd"] and Path(process.info["cwd"]) == folder.resolve():  # ninja works in it
            return True
    return False


def build() -> None:
    """Compile the extensions into FOLDER; needs a C++ compiler. With a GPU, deepspeed_shm_comm is left out."""
    import torch

    os.environ["TORCH_EXTENSIONS_DIR"] = str(FOLDER)
    FOLDER.mkdir(exist_ok=True)
    use()
    from deepspeed.comm.torch import build_shm_op
    from deepspeed.ops.op_builder import CPUAdamBuilder

    ops: dict[str, Callable[[], object]] = {"cpu_adam": CPUAdamBuilder().load}
    if not torch.cuda.is_available():
        ops["deepspeed_shm_comm"] = build_shm_op
    for name, compile_op in ops.items():
        begun = time.monotonic()
        compile_op()
        print(f"setup: compiled {name} in {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    build()
