"""Write signs that an encoding lacks as ASCII: "→" as "->", never as "?"."""

import codecs
import io
import sys
import unicodedata

ERRORS = "dpm-ascii"  # the name under which streams know `spell`
SPELLED = {
    "→": "->",
    "←": "<-",
    "−": "-",
    "–": "-",
    "—": "-",
    "×": "x",
    "≤": "<=",
    "≥": ">=",
    "±": "+-",
    "·": ".",
    "…": "...",
    "²": "^2",
    "├": "|",
    "└": "`",
    "│": "|",
    "─": "-",
    "━": "-",
    "╸": "-",
    "╺": "-",
}


def spell(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace what cannot be encoded by ASCII that means the same, or by the number of the sign: "\\u732b"."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_spell_one, error.object[error.start : error.end])), error.end


def _spell_one(sign: str) -> str:
    if sign in SPELLED:
        return SPELLED[sign]
    plain = unicodedata.normalize("NFKD", sign).encode("ascii", "ignore").decode()
    return plain or sign.encode("ascii", "backslashreplace").decode()


def make_output_safe() -> None:
    """Let streams that cannot show a sign spell it instead of stopping a run."""
    codecs.register_error(ERRORS, spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ERRORS)
