"""The process that the tests' processes are forked from: `server.py FOLDER OWNER ROOM`.

Imports what recipes import, listens on FOLDER/socket, and forks a process for each request of client.py. It ends when
the process OWNER does. ROOM is space: a forked process writes its own command line over this one's.
"""

import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PRELOADED = (
    "accelerate.commands.launch", "torch.distributed.run", "torch.distributed.fsdp", "transformers.trainer", "datasets",
    "peft", "trl.trainer.sft_trainer", "trl.trainer.dpo_trainer", "trl.trainer.reward_trainer",
    "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama",
    "transformers.models.bert.modeling_bert", "transformers.models.auto.tokenization_auto", "torch._dynamo",
)  # fmt: skip
# What this process read at import: a request with other values gets a new interpreter.
READ_AT_IMPORT = (
    "CI", "CUDA_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "DATASETS_", "TRL_", "OMP_", "MKL_", "OPENBLAS_",
    "LD_", "MALLOC_", "PYTHONHASHSEED", "PYTHONWARNINGS", "PYTHONDONTWRITEBYTECODE",
    "TORCHDYNAMO_", "TORCH_LOGS", "TORCH_COMPILE", "TRITON_", "DS_", "BNB_", "WANDB_", "TRACKIO_", "COVERAGE_",
)  # fmt: skip

SET_BY_US = {"TRANSFORMERS_SDPA_FORCE_GQA"}  # by posttrain while a recipe runs, in pytest's own process too


def preload() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    for folder in ("training", "chain", "models", "adapters", "ppo", "tracking", "distributed", "report"):
        for file in sorted((ROOT / "src" / "posttrain" / folder).glob("*.py")):
            if file.stem not in ("__init__", "vllm", "wandb_server", "trackio_sink", "wandb_sink", "deepspeed"):
                importlib.import_module(f"posttrain.{folder}.{file.stem}")
    del sys.modules["accelerate.commands.launch"]  # runpy runs it as __main__, and warns of a second copy
    threads = os.listdir("/proc/self/task")
    if len(threads) > 1:
        names = [Path(f"/proc/self/task/{t}/comm").read_text().strip() for t in threads]
        sys.exit(f"after the imports there are {len(threads)} threads, which a fork would lose: {', '.join(names)}")
    gc.collect()
    gc.freeze()  # or the first collection of every forked process would copy all that they share


def fits(asked: dict[str, str], *known: dict[str, str]) -> bool:
    """Whether what was imported here is what an interpreter with this environment would import; if not, log why."""
    names = {
        name for environment in (asked, *known) for name in environment if name.startswith(READ_AT_IMPORT)
    } - SET_BY_US
    others = [name for name in names if asked.get(name) not in [environment.get(name) for environment in known]]
    if others:
        print(f"a new interpreter, for its own {', '.join(sorted(others))}", flush=True)
    return not others


def serve(folder: Path, owner: int, before: dict[str, str]) -> tuple[dict, socket.socket]:
    """Answer requests until the owner ends. Returns in each forked process only: its request, and the way back.

    `before` is the environment before the imports: some of them set variables, which a process started by one of
    these has, and one started by a bare pytest has not.
    """
    after, children = dict(os.environ), {}  # pidfd -> (pid, connection)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "socket"))
        listening.listen(64)
        (folder / "ready").touch()
        poll, clients, watched = select.poll(), {}, os.pidfd_open(owner)
        poll.register(listening, select.POLLIN)
        poll.register(watched, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == watched:
                    for pid, _ in children.values():
                        os.kill(pid, signal.SIGKILL)
                    os._exit(0)
                elif fd == listening.fileno():
                    connection = listening.accept()[0]
                    request, streams = receive(connection)
                    if request is None or not fits(request["env"], before, after):
                        if request is not None:
                            tell(connection, b"n", 0)
                        connection.close()
                        for stream in streams:
                            os.close(stream)
                        continue
                    pid = os.fork()
                    if pid == 0:
                        for number, stream in enumerate(streams):
                            os.dup2(stream, number)
                        for other in (*streams, *children, watched):
                            os.close(other)
                        for _, other in children.values():
                            other.close()
                        return request, connection
                    for stream in streams:
                        os.close(stream)
                    tell(connection, b"p", pid)
                    pidfd = os.pidfd_open(pid)
                    children[pidfd] = (pid, connection)
                    clients[connection.fileno()] = pid
                    poll.register(pidfd, select.POLLIN)
                    poll.register(connection, select.POLLIN)
                elif fd in children:
                    pid, connection = children.pop(fd)
                    poll.unregister(fd)
                    os.close(fd)
                    tell(connection, b"e", os.waitpid(pid, 0)[1])
                    if clients.pop(connection.fileno(), None):
                        poll.unregister(connection)
                    connection.close()
                elif fd in clients:  # the client is gone, and a client says nothing: it was killed
                    os.kill(clients.pop(fd), signal.SIGKILL)
                    poll.unregister(fd)


def receive(connection: socket.socket) -> tuple[dict | None, list[int]]:
    """A request and its three streams; None from a client that died while it asked."""
    head, streams, _, _ = socket.recv_fds(connection, 8, 3)
    if len(head) < 8:
        return None, streams
    length, text = struct.unpack("=Q", head)[0], b""
    while len(text) < length:
        part = connection.recv(length - len(text))
        if not part:
            return None, streams
        text += part
    return json.loads(text), streams


def tell(connection: socket.socket, kind: bytes, value: int) -> None:
    try:
        connection.sendall(struct.pack("=ci", kind, value))
    except (BrokenPipeError, ConnectionResetError):
        return  # a client that was killed hears no more


def become(request: dict, connection: socket.socket, interpreter: str, path: list[str]) -> None:
    """Make this process what an interpreter with the request's command line would be, and run its script."""
    words = request["argv"][1:]
    unbuffered = words[0] == "-u" or bool(request["env"].get("PYTHONUNBUFFERED"))
    words = words[1:] if words[0] == "-u" else words
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    os.umask(request["umask"])
    write_command_line(request["argv"])
    sys.executable = interpreter
    sys.stdout.reconfigure(line_buffering=unbuffered or os.isatty(1), write_through=unbuffered)

    from posttrain.launch import accelerate

    # `prctl` here would tie this process to the server. What a recipe asks for is that it dies with its launcher.
    accelerate.die_with_parent = lambda: tell(connection, b"d", 0)

    more = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    importlib.invalidate_caches()
    if words[0] == "-m":
        sys.path[:] = [os.getcwd(), *more, *path]
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[:] = [str(Path(words[0]).resolve().parent), *more, *path]
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def write_command_line(argv: list[str]) -> None:
    """Show `argv` in /proc/PID/cmdline, where tests and people look for a process."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    text = b"\0".join(os.fsencode(word) for word in argv)[: end - start - 1]
    ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


def main() -> None:
    folder, owner = Path(sys.argv[1]), int(sys.argv[2])
    inherited = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    path = [p for p in sys.path[1:] if p not in inherited]
    before = dict(os.environ)
    preload()
    request, connection = serve(folder, owner, before)
    become(request, connection, str(folder / "bin" / "python"), path)


if __name__ == "__main__":
    main()
