"""Exceptions. Each message names the argument, its value, the rule and the way out."""


class MarlinError(Exception):
    """Base class: everything this project raises on purpose."""


class ConfigError(MarlinError, ValueError):
    """An option or a combination of options that cannot work."""


class DataError(MarlinError):
    """A text or task source that is missing, empty or malformed."""


class CheckpointError(MarlinError):
    """A checkpoint that is missing, incomplete, or does not hold what it claims."""


class NumericalError(MarlinError, ArithmeticError):
    """NaN or Inf where finite numbers are required; the message names the layer."""
