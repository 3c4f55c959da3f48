"""Error of wrong settings."""


class SettingsError(ValueError):
    """A user's mistake in a configuration: one sentence that names the value, its location and the fix."""
