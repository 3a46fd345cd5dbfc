"""What it means when the Hub, or the way to it, refuses: an error of ours for each of theirs."""

from __future__ import annotations

from sdcli.errors import InputError
from sdcli.files import reason
from sdcli.hub import HubId

LOG_IN = "set HF_TOKEN, or log in with hf auth login"


class BrokenOff(Exception):
    """The connection, or the server, failed in a way that another try may not."""


def told(error: Exception, hub_id: HubId) -> InputError | BrokenOff:
    """What an error of huggingface_hub, or of the HTTP library that it stands on, means for an id."""
    from huggingface_hub import get_token  # deferred: 0.4 s, and only who asks the Hub needs it
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RevisionNotFoundError

    if isinstance(error, InputError | BrokenOff):
        return error
    if isinstance(error, OfflineModeIsEnabled):
        return InputError(f"{hub_id}: is to be had from the Hub alone", "HF_HUB_OFFLINE forbids to ask it")
    if not isinstance(error, HfHubHTTPError):
        return BrokenOff(f"{type(error).__name__}: {reason(error)}")
    code = error.response.status_code
    if isinstance(error, GatedRepoError):
        return InputError(f"{hub_id}: is gated", f"accept its terms at {ENDPOINT}/{hub_id.repo}, and {LOG_IN}")
    if isinstance(error, RevisionNotFoundError):
        return InputError(f"{hub_id}: has no revision {hub_id.branch}", "name a branch, a tag or a commit that it has")
    if code in (401, 403) and get_token() is not None:
        return InputError(
            f"{hub_id}: the Hub refuses your token for it (HTTP {code})", f"check the name; else {LOG_IN}"
        )
    if code in (401, 403, 404):
        return InputError(f"{hub_id}: is not on the Hub, or private", f"check the name; of a private one, {LOG_IN}")
    return BrokenOff(f"the Hub answers with HTTP {code}")
