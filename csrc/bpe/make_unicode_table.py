"""Writes unicode_table.inc, the character classes of Unicode 16.0 that the splitters need.

Run with `unicodedata2==16.0.0` installed: python csrc/bpe/make_unicode_table.py
"""

import sys
from pathlib import Path

import unicodedata2

if unicodedata2.unidata_version != "16.0.0":
    sys.exit(f"need unicodedata2 16.0.0, got Unicode {unicodedata2.unidata_version}")

# The property White_Space; unicodedata has no name for it.
WHITE_SPACE = {*range(0x09, 0x0E), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B)}
WHITE_SPACE |= {0x2028, 0x2029, 0x202F, 0x205F, 0x3000}


def character_class(code: int) -> int:
    """The value of enum CharClass in unicode.h."""
    if code in (0x0A, 0x0D):
        return 7
    if code in WHITE_SPACE:
        return 6
    category = unicodedata2.category(chr(code))
    if category in ("Lu", "Lt"):
        return 1
    if category == "Ll":
        return 2
    if category in ("Lm", "Lo"):
        return 3
    return {"M": 4, "N": 5}.get(category[0], 0)


ranges = []
for code in range(0x110000):
    value = character_class(code)
    if not ranges or ranges[-1] & 7 != value:
        ranges.append(code << 3 | value)

lines = ["// Made by make_unicode_table.py from Unicode 16.0: (first code point << 3 | class)."]
line = ""
for value in ranges:
    item = f"{value:#x},"
    if len(line) + len(item) > 100:
        lines.append(line)
        line = ""
    line += item
lines.append(line)
Path(__file__).with_name("unicode_table.inc").write_text("\n".join(lines) + "\n")
