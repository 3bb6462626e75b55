"""Errors that a user can cause. The command line prints one line for them and exits with status 2."""


class UserError(ValueError):
    """An input does not fit. The message says what is wrong, what was expected and what to do."""


class ConfigError(UserError):
    """A configuration has an unknown field, a value of the wrong type, or values that contradict each other."""


class SpecMismatchError(UserError):
    """Two artefacts (tokenizer, code cache, prior, image set) do not fit together; the message lists the differences."""
