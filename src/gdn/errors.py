"""Errors that a user can mend. The command line prints their one line and exits with code 2; anything else is a bug."""


class GDNError(Exception):
    """Base of all errors caused by input, machine or configuration; the message names what, where and what was expected."""


class ConfigError(GDNError):
    """A recipe, an override or a model configuration that cannot be used as given."""


class DataError(GDNError):
    """Text, tokenizer or token shards that cannot be read, or are not what their manifest says."""


class CheckpointError(GDNError):
    """A checkpoint or model folder that is missing, altered, incomplete or of another configuration."""


class BackendError(GDNError):
    """An operator was asked of a backend that cannot compute it."""


class RunError(GDNError):
    """A run that cannot start or go on: its folder is in use, or its loss is no longer finite."""
