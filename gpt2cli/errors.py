"""The one exception that is shown to people."""


class UserError(Exception):
    """A mistake the user can mend: says what was found, what was expected and what to run. Shown as one line, exit 1."""
