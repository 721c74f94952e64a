"""Write numbers and lists the way people read them."""

NOTHING = "–"
MINUS = "\N{MINUS SIGN}"


def count(number: float | None) -> str:
    """Write 125747584 as "125.7 M". A recipe takes the same suffixes."""
    return NOTHING if number is None else _scaled(number, ("", "K", "M", "G", "T"))


def cost(kind: str, number: float) -> str:
    """Round MACs and parameters; write units in full, because there are few of them: 1120; and bytes as a size."""
    if kind == "latency":  # in nanoseconds
        return milliseconds(number / 1e6)
    return size(number) if kind == "size" else f"{number:.0f}" if kind == "channels" else count(number)


def asked(kind: str, amount: float) -> str:
    """Write what was asked for: a fraction, points of accuracy, or an absolute cost."""
    if kind == "drop":
        return f"{amount:g} point{'s' if amount != 1 else ''}"
    return f"{amount:g}" if amount < 1 else cost(kind, amount)


def size(number: float | None) -> str:
    """Write bytes in powers of ten: 3462114 as "3.46 MB"."""
    return NOTHING if number is None else _scaled(number, ("B", "KB", "MB", "GB", "TB"))


def percent(value: float | None, digits: int = 2) -> str:
    return NOTHING if value is None else f"{value:.{digits}f} %"


def milliseconds(value: float | None) -> str:
    """Write three significant digits: 0.123 ms, 5.68 ms, 123 ms."""
    if value is None:
        return NOTHING
    return f"{value:.{3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0}f} ms"


def agreement(difference: float) -> str:
    """Say how closely outputs agree: "to 4e-07", or "exactly"."""
    return f"to {difference:.0e}" if difference else "exactly"


def duration(seconds: float) -> str:
    """Write a duration as 48 s, 12 min 30 s or 3 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def cost_change(dense: float, slim: float) -> str:
    """Say what a cost lost in percent and by which factor it shrank: "−53.1 %  2.13×"."""
    if not dense or not slim:
        return NOTHING
    return f"{_signed(100 * (slim / dense - 1), 1)} %  {dense / slim:.2f}×"


def points_change(dense: float | None, slim: float | None) -> str:
    """Write the difference of two percentages in points: "−0.43 points"."""
    return NOTHING if dense is None or slim is None else f"{_signed(slim - dense, 2)} points"


def speed_change(dense: float, slim: float) -> str:
    """Compare two latencies: "1.55× faster", or "as fast" if the factor would read 1.00×."""
    if not dense or not slim:
        return NOTHING
    ratio = dense / slim
    factor = f"{max(ratio, 1 / ratio):.2f}"
    return "as fast" if factor == "1.00" else f"{factor}× {'faster' if ratio > 1 else 'slower'}"


def _signed(value: float, digits: int) -> str:
    text = f"{abs(value):.{digits}f}"
    sign = "" if float(text) == 0 else "+" if value > 0 else MINUS
    return sign + text


def _scaled(number: float, units: tuple[str, ...]) -> str:
    place = 0
    while abs(number) >= 999.95 and place < len(units) - 1:
        number, place = number / 1000, place + 1
    digits = 0 if not place else 2 if abs(number) < 9.995 else 1
    return f"{number:.{digits}f} {units[place]}".rstrip()
