"""The one exception that is shown to people, and how sizes and numbers are written in it."""


class UserError(Exception):
    """A mistake the user can mend: says what was found, what was expected and what to run. Shown as one line, exit 1."""


class Told(UserError):
    """A mistake that another process of the same run shows: here only the exit status tells of it."""


def many(count: int, thing: str) -> str:
    """1, "token" -> 1 token; 1000, "token" -> 1,000 tokens"""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def size(count: float) -> str:
    """1536000 -> 1.5 MB"""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    raise AssertionError
