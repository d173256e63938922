"""Times as a person reads them."""


def milliseconds(value: float) -> str:
    """Such as 136.3 ms, 1.24 s, 12.3 s."""
    if value < 999.95:
        return f"{value:.1f} ms"
    return f"{value / 1000:.2f} s" if value < 9995 else f"{value / 1000:,.1f} s"
