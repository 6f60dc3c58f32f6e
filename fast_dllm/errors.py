"""The one exception that the programs turn into a single line and exit code 2."""


class UsageError(ValueError):
    """Something the caller asked for cannot be had; the message is one line naming the fault and the valid choices."""
