"""The errors that a user can mend; whatever else is raised is a defect of this program."""


class QuickbloomError(Exception):
    """Base of the errors whose message is written for the user: one sentence that says what to change."""


class ConfigError(QuickbloomError):
    """A setting is unknown, has a wrong type, or has a value that cannot work."""


class DataError(QuickbloomError):
    """A data file is missing or unreadable, or its content does not fit the settings."""
