"""Numbers as people read them."""


def size(count: float) -> str:
    """Bytes with a unit: 12_345 -> "12.3 kB"."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def counted(number: int, thing: str) -> str:
    """1 step, 2 steps."""
    return f"{number} {thing}{'s' * (number != 1)}"
