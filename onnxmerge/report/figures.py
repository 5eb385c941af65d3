"""How figures are written: three significant digits, and never a number for what was not measured."""

import unicodedata


def significant(value: float) -> str:
    """`value` with about three significant digits: "1234", "12.3", "0.083", "6e-07"."""
    size = abs(value)
    if size >= 99.95:
        return f"{value:.0f}"
    if size >= 9.995:
        return f"{value:.1f}"
    if size >= 0.9995:
        return f"{value:.2f}"
    if size >= 0.001 or size == 0:
        return f"{value:.3f}"
    return f"{value:.0e}"


def count(value: int) -> str:
    """A number of parameters: "812", "272 k", "25.6 M"."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * scale:
            return f"{significant(value / scale)} {unit}"
    return str(value)


def megabytes(size: float) -> str:
    """`size` bytes in MB (1e6 bytes), without the unit."""
    return significant(size / 1e6)


def percent(fraction: float) -> str:
    """A fraction in 0..1 in percent with one decimal, without the unit."""
    return f"{100 * fraction:.1f}"


def points(difference: float) -> str:
    """A difference of two fractions in percentage points, signed: "-0.7", "+0.2", "0.0"."""
    text = f"{100 * difference:+.1f}"
    return "0.0" if float(text) == 0 else text


def times(ratio: float) -> str:
    """A ratio: "1.35x"."""
    return f"{ratio:.2f}x"


def one_line(name: str) -> str:
    """A name from outside as one printable line: white space collapsed, control characters replaced."""
    spaced = " ".join(name.split())
    return "".join(c if _printable(c) else "\N{REPLACEMENT CHARACTER}" for c in spaced)


def shortened(name: str, longest: int) -> str:
    """`one_line(name)`, without its middle where it is longer: names often differ at their ends."""
    name = one_line(name)
    half = (longest - 3) // 2
    return name if len(name) <= longest else f"{name[:half]}...{name[-half:]}"


def _printable(character: str) -> bool:
    """Whether XML and UTF-8 take the character: no control character, surrogate or non-character."""
    return unicodedata.category(character) not in ("Cc", "Cs") and character not in "\ufffe\uffff"
