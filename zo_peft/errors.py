"""The errors a user can mend: each says what was wrong, where, and what to do."""


class Notice(UserWarning):
    """What a user should know of a run that goes on; the command line shows no other warnings."""


class UserError(ValueError):
    """Settings, data or a model that cannot work as given; the command line exits with 2."""


class NonFiniteLossError(UserError):
    """Too many losses in a row were of no use; the adapter holds its last good values."""
