"""The errors a user can mend: each says what was wrong, where, and what to do."""


class UserError(ValueError):
    """Settings, data or a model that cannot work as given; the command line exits with 2."""


class NonFiniteLossError(UserError):
    """A candidate's loss is NaN or infinite; the adapter holds its last good values."""
