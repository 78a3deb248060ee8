"""The W&B server that this machine is set up for: where it is, by which key, and whether it answers."""

import os
from dataclasses import dataclass
from typing import Any

QUESTION = {"query": "query Viewer { viewer { id } }"}


@dataclass(frozen=True)
class WandbServer:
    """Where W&B's client would send a run to."""

    url: str
    auth: Any  # wandb's own: a key, or an identity token's file; None: there is none
    no_auth: str = ""  # why there is none

    @classmethod
    def configured(cls) -> "WandbServer":
        """As `wandb.init` would find it: the environment, .netrc, W&B's settings file; never a prompt."""
        if os.environ.get("WANDB_MODE") == "":
            del os.environ["WANDB_MODE"]  # W&B's settings refuse an empty one
        import wandb
        from wandb.errors import AuthenticationError
        from wandb.sdk.lib import wbauth

        url = wandb.setup().settings.base_url.rstrip("/")
        try:
            auth = wbauth.authenticate_session(host=url, source="posttrain", prompt=False, update_session=False)
        except AuthenticationError as error:
            return cls(url, None, f"the key for {url} is none: {error}")
        return cls(url, auth, "" if auth else f"no key for {url} was found: `wandb login` stores one")

    def trouble(self, timeout_s: float) -> str:
        """Why the server cannot be used, in words; empty when it takes the key."""
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
