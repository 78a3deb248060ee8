"""The choice of dashboards and of W&B's mode: precedence of the settings, and servers that do not answer."""

import pytest
from recording_server import KEY, RecordingServer

from posttrain.config.sections import TrackingSettings
from posttrain.config.stage_config import parse_args
from posttrain.errors import ConfigError
from posttrain.tracking import select as choice
from posttrain.tracking import wandb_server
from posttrain.tracking.select import choose, choose_wandb_mode


@pytest.mark.parametrize(
    ("report_to", "environ", "sinks"),
    [
        ("none", {"POSTTRAIN_REPORT_TO": "trackio"}, ()),
        ("trackio", {}, ("trackio",)),
        (["trackio", "wandb"], {"WANDB_MODE": "disabled"}, ("trackio", "wandb")),
        (None, {"POSTTRAIN_REPORT_TO": "wandb,trackio", "WANDB_MODE": "offline"}, ("wandb", "trackio")),
        (None, {"POSTTRAIN_REPORT_TO": "none"}, ()),
        (None, {}, ("trackio",)),
    ],
)
def test_dashboards_are_chosen_by_setting_environment_and_installation(report_to, environ, sinks):
    assert choose(TrackingSettings(report_to=report_to), environ).sinks == sinks


def test_without_trackio_the_default_is_no_dashboard(monkeypatch):
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
    chosen = choose(TrackingSettings(), {})
    assert chosen.sinks == ()
    assert "posttrain[trackio]" in str(chosen)
    with pytest.raises(ConfigError, match=r"wandb is not installed; run `pip install 'posttrain\[wandb\]'`"):
        choose(TrackingSettings(report_to="wandb"), {})


@pytest.mark.parametrize("value", ["tensorboard", "all", "[trackio, mlflow]", "wandb_"])
def test_an_unknown_dashboard_is_refused_with_the_configuration(value):
    with pytest.raises(ConfigError, match="report_to must be a list or one of none, trackio, wandb or null"):
        parse_args("sft", ["--output_dir", "o", "--report_to", value])


@pytest.mark.parametrize("value", ["tensorboard", "trackio,all", "none,wandb"])
def test_an_unknown_dashboard_in_the_environment_is_refused(value):
    with pytest.raises(ConfigError, match="POSTTRAIN_REPORT_TO"):
        choose(TrackingSettings(), {"POSTTRAIN_REPORT_TO": value})


def test_report_to_does_not_change_the_key_material():
    keys = [
        parse_args("sft", ["--output_dir", "o", *more]).key_material()
        for more in ([], ["--report_to", "wandb", "--wandb_mode", "offline", "--project", "p", "--run_name", "r"])
    ]
    assert keys[0] == keys[1]


@pytest.mark.parametrize(
    ("explicit", "environ", "mode", "why"),
    [
        ("offline", {"WANDB_MODE": "online"}, "offline", "wandb_mode"),
        (None, {"WANDB_MODE": "offline"}, "offline", "WANDB_MODE=offline"),
        (None, {"WANDB_MODE": "dryrun"}, "offline", "WANDB_MODE=dryrun"),
        ("disabled", {}, "disabled", "wandb_mode"),
    ],
)
def test_the_chosen_wandb_mode_is_used(explicit, environ, mode, why):
    assert choose_wandb_mode(explicit, environ) == (mode, why)


def test_an_unknown_mode_in_the_environment_is_refused():
    with pytest.raises(ConfigError, match="WANDB_MODE must be one of online, run, offline, dryrun, disabled, got 'on'"):
        choose_wandb_mode(None, {"WANDB_MODE": "on"})


@pytest.fixture
def at(monkeypatch, tmp_path):
    """Set W&B's server and key, and make wandb read its settings again."""
    import wandb

    def set_up(url, key=None):
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
        monkeypatch.setenv("WANDB_MODE", "")  # wandb's own settings would refuse it
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
        if key is not None:
            monkeypatch.setenv("WANDB_API_KEY", key)
        wandb.teardown()
        return choose_wandb_mode(None, {})

    yield set_up
    monkeypatch.undo()
    wandb.teardown()


def test_without_a_key_the_run_is_offline(at):
    mode, why = at("http://127.0.0.1:9")
    assert mode == "offline"
    assert "no key for http://127.0.0.1:9 was found" in why


def test_an_invalid_key_makes_the_run_offline(at):
    mode, why = at("http://127.0.0.1:9", "short")
    assert (mode, "key" in why) == ("offline", True)
    assert "short" not in why.split("API key")[0]


def test_an_accepted_key_makes_the_run_online(at):
    with RecordingServer() as server:
        assert at(server.url, KEY) == ("online", f"a key for {server.url} was found")


def test_a_refused_key_makes_the_run_offline(at):
    with RecordingServer(refuse=True) as server:
        mode, why = at(server.url, KEY)
    assert (mode, why) == ("offline", f"{server.url} refused the key; `wandb sync` sends it later")


def test_an_unreachable_server_makes_the_run_offline(at):
    mode, why = at("http://127.0.0.1:9", KEY)
    assert mode == "offline"
    assert "http://127.0.0.1:9 did not answer (ConnectionError)" in why


def test_a_hanging_server_is_given_up_within_seconds(at, monkeypatch):
    import socket

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(choice, "PROBE_S", 0.3)
        mode, why = at(f"http://127.0.0.1:{silent.getsockname()[1]}", KEY)
    assert (mode, "did not answer (ReadTimeout)" in why) == ("offline", True)
    assert wandb_server  # what was asked
