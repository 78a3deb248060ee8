"""The W&B server that this machine is configured for: its address, its key, and whether it answers."""

import os
from dataclasses import dataclass
from typing import Any

QUESTION = {"query": "query Viewer { viewer { id } }"}


@dataclass(frozen=True)
class WandbServer:
    """The server to which W&B's client would send a run."""

    url: str
    auth: Any  # wandb's object: a key, or the file of an identity token; None if there is none
    no_auth: str = ""  # why `auth` is None

    @classmethod
    def configured(cls) -> "WandbServer":
        """Find it as `wandb.init` would: environment, .netrc, W&B's settings file; never asks for a key."""
        if os.environ.get("WANDB_MODE") == "":
            del os.environ["WANDB_MODE"]  # W&B's settings refuse an empty one
        import wandb
        from wandb.errors import AuthenticationError
        from wandb.sdk.lib import wbauth

        url = wandb.setup().settings.base_url.rstrip("/")
        try:
            auth = wbauth.authenticate_session(host=url, source="posttrain", prompt=False, update_session=False)
        except AuthenticationError as error:
            return cls(url, None, f"the key for {url} is not valid: {error}")
        return cls(url, auth, "" if auth else f"no key for {url} was found: `wandb login` stores one")

    def trouble(self, timeout_s: float) -> str:
        """Why the server cannot be used; empty if it accepts the key."""
        import requests

        key = getattr(self.auth, "api_key", None)
        try:
            answer = requests.post(
                f"{self.url}/graphql", json=QUESTION, auth=("api", key) if key else None, timeout=timeout_s
            )
        except requests.RequestException as error:
            return f"{self.url} did not answer ({type(error).__name__})"
        if answer.status_code in (401, 403):
            return f"{self.url} refused the key"
        if answer.status_code != 200:
            return f"{self.url} answered {answer.status_code}"
        if key and not (_viewer(answer) or {}).get("id"):
            return f"{self.url} does not know the key"
        return ""


def _viewer(answer: Any) -> Any:
    try:
        return answer.json()["data"]["viewer"]
    except (ValueError, KeyError, TypeError):
        return None
