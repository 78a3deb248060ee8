"""The lock of a killed build is deleted; a running build is waited for, but not forever."""

import os
import subprocess
import sys
import time

import pytest

from posttrain.distributed import deepspeed_build as extensions
from posttrain.errors import LaunchError


@pytest.fixture
def lock(tmp_path):
    (tmp_path / "cpu_adam").mkdir()
    file = tmp_path / "cpu_adam" / "lock"
    file.touch()
    return file


def grow_old(lock, seconds=1000):
    then = time.time() - seconds
    for file in (lock, lock.parent):
        os.utime(file, (then, then))


def test_a_stale_lock_is_deleted_with_a_note(lock, tmp_path, capsys):
    grow_old(lock)
    extensions.free(tmp_path)
    assert not lock.exists()
    assert f"deleted {lock}, left by an interrupted build" in capsys.readouterr().out


def test_a_running_build_is_waited_for_up_to_the_limit(lock, tmp_path):
    grow_old(lock)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"], cwd=lock.parent) as compiler:
        try:
            with pytest.raises(LaunchError, match="has been compiling there for 1 s"):
                extensions.free(tmp_path, wait_s=1)
            assert lock.exists()
        finally:
            compiler.kill()
    extensions.free(tmp_path)
    assert not lock.exists()


def test_a_build_that_ends_meanwhile_is_no_error(lock, tmp_path):
    with subprocess.Popen(["sh", "-c", f"sleep 0.5; rm {lock}"]):
        extensions.free(tmp_path, wait_s=60)
    assert not lock.exists()


def test_extensions_built_ahead_are_found(monkeypatch, tmp_path):
    monkeypatch.setattr(extensions, "FOLDER", tmp_path)
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("PATH", "/usr/bin")
    extensions.use()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path)
    assert os.environ["PATH"].split(os.pathsep)[0] == os.path.dirname(sys.executable)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "mine"))
    extensions.use()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path / "mine")
