# An interpreter's command line, run by the fork server. `__init__._start` puts REAL and SOCKET above this text.
import json
import os
import signal
import socket
import struct
import sys

MODULES = ("posttrain.cli", "accelerate.commands.launch")
PR_SET_PDEATHSIG = 1


def new_interpreter():
    os.execv(REAL, [REAL, *sys.argv[1:]])  # noqa: F821


def can_fork(words):
    """A script of ours, or a module that is started as one."""
    if words[:1] == ["-u"]:
        words = words[1:]
    if words[:1] == ["-m"]:
        return words[1:2] and words[1] in MODULES
    return words[:1] and not words[0].startswith("-") and words[0].endswith(".py")


def main():
    if not can_fork(sys.argv[1:]):
        new_interpreter()
    request = json.dumps(
        {"argv": sys.argv, "env": dict(os.environ), "cwd": os.getcwd(), "umask": (mask := os.umask(0))}
    ).encode()
    os.umask(mask)
    child, early = 0, []

    def forward(number, frame):
        if child:
            os.kill(child, number)
        else:
            early.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, forward)
    parent = os.getppid()
    server = socket.socket(socket.AF_UNIX)
    server.connect(SOCKET)  # noqa: F821
    socket.send_fds(server, [struct.pack("=Q", len(request))], [0, 1, 2])
    server.sendall(request)
    while message := server.recv(5, socket.MSG_WAITALL):
        kind, value = struct.unpack("=ci", message)
        if kind == b"n":  # this environment needs modules of its own
            for number in early:
                os.kill(os.getpid(), number)
            new_interpreter()
        elif kind == b"p":
            child = value
            for number in early:
                os.kill(child, number)
        elif kind == b"d":
            # The forked process is the server's child: this one, which stands for it, dies with its parent instead.
            import ctypes

            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGKILL)
        elif kind == b"e":
            if os.WIFSIGNALED(value):
                number = os.WTERMSIG(value)
                if number not in (signal.SIGKILL, signal.SIGSTOP):
                    signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            os._exit(os.waitstatus_to_exitcode(value))
    sys.exit("the fork server has ended")


main()
