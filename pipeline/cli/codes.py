"""Exit codes, and the one line of an error that is the user's to mend."""

from __future__ import annotations

DONE, FAILED, USAGE, BAD_DATA, RESUMABLE = 0, 1, 2, 3, 75
NOTHING_LEFT = 4  # of `launch --draw`, which job scripts call: the sweep has no more runs


def code_of(error: Exception) -> int | None:
    """The exit code of an error that is the user's to mend, or None for one that is ours."""
    names = {kind.__name__ for kind in type(error).__mro__}  # by name: their modules may not be imported
    if isinstance(error, OSError) and error.filename is not None:
        return FAILED  # no space, no permission, no such place
    if "InterruptedRunError" in names:
        return RESUMABLE  # of an evaluation, whose images are kept; `train` answers its own
    if names & {
        "LockedError",
        "CheckpointError",
        "SyncError",
        "QueueError",
        "SweepError",
        "CommandError",
        "DashboardError",
        "ExportError",
    }:
        return FAILED
    if "FailedRunError" in names:
        return int(error.code)  # type: ignore[attr-defined]
    return (
        USAGE
        if names & {"ConfigError", "NotARunError", "PlaceError"}
        else BAD_DATA
        if names & {"DataError", "PredictionsError"}
        else None
    )


def line_of(error: Exception) -> str:
    """The message itself."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error).strip()
