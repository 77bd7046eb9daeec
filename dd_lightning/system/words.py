"""Words for people."""


def counted(count: int, what: str) -> str:
    """How many of something.

    Example:
        >>> counted(1, "network"), counted(0, "network"), counted(2000, "network")
        ('1 network', '0 networks', '2,000 networks')
    """
    return f"{count:,} {what}{'' if count == 1 else 's'}"
