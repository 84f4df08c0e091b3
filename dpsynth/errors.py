"""One class per cause. Each message says what was expected, what was found and what to do next.

The command line turns an error into one line and an exit code: 1 broke, 2 wrong usage, input or configuration,
3 refused by the budget, a check or the gate; 130 is Ctrl-C. No message may hold a patient id when it can leave the site.
"""

from __future__ import annotations


class DpsynthError(Exception):
    """Root of all errors that a user may meet; `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(DpsynthError):
    """The command, the configuration or the input is wrong; nothing was written."""

    exit_code = 2


class ConfigError(UsageError):
    """A setting is unknown, missing or out of range; the message names its path."""


class DataError(UsageError):
    """Images or tables cannot be used as they are."""


class ArtifactError(UsageError):
    """A run folder is incomplete, of another version, changed, or used in the wrong order."""


class StorageError(UsageError):
    """A file could not be written: no space, no permission."""


class SignatureError(UsageError):
    """A key cannot be read, or a signature does not belong to the bytes or to the key."""


class LedgerError(UsageError):
    """The ledger cannot be used: missing, for other data, or the call is out of order."""


class RefusedError(DpsynthError):
    """Something that the rules forbid was asked for."""

    exit_code = 3


class LedgerTampered(RefusedError):
    """The ledger's chain, head or budget does not hold; the message names the line."""


class BudgetExceeded(RefusedError):
    """The reservation would pass the data owner's budget."""


class ClaimRefused(RefusedError):
    """The accountants disagree or delta is too large: no epsilon may be claimed."""


class SelfCheckFailed(RefusedError):
    """The training engine does not keep the bound that the accounting assumes."""


class GateRefused(RefusedError):
    """The gate refused the release; the message lists every reason."""
