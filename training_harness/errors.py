"""Failures that a user can cause, as one class that the command line turns into one line and exit status 2."""


class UserError(ValueError):
    """Something the user gave does not fit. The message says what was found, what was expected and what to do."""


class ConfigError(UserError):
    """A configuration holds an unknown field, a value of another type, or values that contradict each other."""


class SpecMismatchError(UserError):
    """Two artefacts (tokenizer, code cache, prior, image set) do not belong together; the message lists what differs."""
