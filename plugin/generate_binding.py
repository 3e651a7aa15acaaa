"""Writes `lycore/_binding.py` from `include/lycore.h`, so that no signature is written twice.

The header is cbindgen's: a small, regular part of C. This reads exactly that part and stops with the line at fault on
anything else; a declaration that it merely skipped would be a crash in a host later.

    python plugin/generate_binding.py            write the file
    python plugin/generate_binding.py --check    exit 1 when the file is stale
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

PLUGIN = Path(__file__).resolve().parent
HEADER = PLUGIN.parent / "include" / "lycore.h"
BINDING = PLUGIN / "lycore" / "_binding.py"
WIDTH = 120

SCALARS = {
    "bool": "c_bool",
    "double": "c_double",
    "float": "c_float",
    "int32_t": "c_int32",
    "int64_t": "c_int64",
    "uint8_t": "c_uint8",
    "uint16_t": "c_uint16",
    "uint32_t": "c_uint32",
    "uint64_t": "c_uint64",
}
# What the preprocessor of a C99 compiler makes of the conditions in the header.
CONDITIONS = {
    "#ifndef LYCORE_H": True,
    "#ifdef __cplusplus": False,
    "#ifndef __cplusplus": True,
    "#if __STDC_VERSION__ >= 202311L": False,
    "#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L": False,
}


class NotUnderstoodError(Exception):
    """The header holds something that this generator does not know."""


@dataclass
class Header:
    """What a header declares, types already in ctypes' words."""

    constants: list[tuple[str, int]] = field(default_factory=list)
    enums: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    opaque: set[str] = field(default_factory=set)
    structs: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    callbacks: dict[str, tuple[str, list[str]]] = field(default_factory=dict)
    functions: dict[str, tuple[str, list[tuple[str, str]]]] = field(default_factory=dict)


def preprocess(text: str, header: Header) -> str:
    """Drops comments, takes the branches of a C99 compiler, collects `#define NAME number`."""
    kept: list[str] = []
    taken: list[bool] = []
    for number, full in enumerate(text.splitlines(), 1):
        line = re.sub(r"/\*[^*]*\*/", "", full.split("//")[0]).rstrip()
        if "/*" in line or line.endswith("\\"):
            raise NotUnderstoodError(f"line {number}: a comment or a line over several lines: {full}")
        word = line.strip()
        if not word.startswith("#"):
            if all(taken):
                kept.append(line)
            continue
        define = re.fullmatch(r"#define (LYCORE_\w+)(?: (-?\d+))?", word)
        if word in CONDITIONS:
            taken.append(CONDITIONS[word])
        elif word == "#else" and taken:
            taken[-1] = not taken[-1]
        elif word == "#endif" and taken:
            taken.pop()
        elif define and all(taken):
            if define[2] is not None:
                header.constants.append((define[1], int(define[2])))
            elif define[1] != "LYCORE_H":
                raise NotUnderstoodError(f"line {number}: a macro without a number: {full}")
        elif word not in ("#include <stdbool.h>", "#include <stdint.h>"):
            raise NotUnderstoodError(f"line {number}: {full}")
    if taken:
        raise NotUnderstoodError("an #if without its #endif")
    return "\n".join(kept)


def statements(text: str) -> list[str]:
    """Splits at every `;` outside braces; white space becomes single blanks."""
    found, depth, start = [], 0, 0
    for at, char in enumerate(text):
        depth += (char == "{") - (char == "}")
        if char == ";" and depth == 0:
            found.append(" ".join(text[start:at].split()))
            start = at + 1
    if text[start:].strip() or depth:
        raise NotUnderstoodError(f"text after the last declaration: {text[start:].strip()[:80]}")
    return found


def ctype(declared: str, header: Header) -> str:
    """A C type, without the name that it declares, in ctypes' words."""
    words = re.sub(r"\b(const|struct|enum)\b", " ", declared.replace("*", " * ")).split()
    if not words or any(w != "*" for w in words[1:]):
        raise NotUnderstoodError(f"type `{declared}`")
    base, stars = words[0], len(words) - 1
    base = header.aliases.get(base, base)
    if base in SCALARS:
        kind = SCALARS[base]
    elif base in header.structs or base in header.callbacks:
        kind = base
    elif base == "void" and stars == 0:
        return "None"
    elif base in ("void", "char") or base in header.opaque:
        if stars == 0:
            raise NotUnderstoodError(f"type `{declared}` by value")
        # A `char *` that is the caller's must keep its address for lycore_text_free: only constant text is c_char_p.
        kind = "c_char_p" if base == "char" and re.match(r"const char\b", declared) else "c_void_p"
        stars -= 1
    else:
        raise NotUnderstoodError(f"type `{declared}`: `{base}` is not declared before its use")
    return "POINTER(" * stars + kind + ")" * stars


def named(declared: str, header: Header) -> tuple[str, str]:
    """`type name` as (name, ctype)."""
    match = re.fullmatch(r"(.*?[\s*])(\w+)", declared.strip())
    if not match:
        raise NotUnderstoodError(f"declaration `{declared}`")
    return match[2], ctype(match[1], header)


def parameters(text: str, header: Header) -> list[tuple[str, str]]:
    """The parameters between the brackets of a function."""
    return [] if text.strip() == "void" else [named(p, header) for p in text.split(",")]


def declare(statement: str, header: Header) -> None:
    """Reads one declaration."""
    if match := re.fullmatch(r"enum (\w+) \{ (.*) \}", statement):
        values = [re.fullmatch(r"(\w+) = (-?\d+)", part.strip()) for part in match[2].rstrip(", ").split(",")]
        if not all(values):
            raise NotUnderstoodError(f"enum `{match[1]}` has a value without a number")
        header.enums[match[1]] = [(v[1], int(v[2])) for v in values if v]
    elif match := re.fullmatch(r"typedef (\w+) (\w+)", statement):
        if match[1] not in SCALARS or match[2] not in header.enums:
            raise NotUnderstoodError(statement)
        header.aliases[match[2]] = match[1]
    elif match := re.fullmatch(r"typedef struct (\w+) \1", statement):
        header.opaque.add(match[1])
    elif match := re.fullmatch(r"typedef struct (\w+) \{ (.*); \} \1", statement):
        header.structs[match[1]] = [named(f, header) for f in match[2].split(";")]
    elif match := re.fullmatch(r"typedef ([^()]+) \(\*(\w+)\)\(([^()]+)\)", statement):
        header.callbacks[match[2]] = (ctype(match[1], header), [kind for _, kind in parameters(match[3], header)])
    elif match := re.fullmatch(r"([^(){}]+[\s*])(lycore_\w+)\(([^()]+)\)", statement):
        header.functions[match[2]] = (ctype(match[1], header), parameters(match[3], header))
    else:
        raise NotUnderstoodError(statement)


def read(text: str) -> Header:
    """Everything that the header declares."""
    header = Header()
    body = preprocess(text, header)
    if body.count('extern "C"') > 0:
        raise NotUnderstoodError('extern "C" outside of #ifdef __cplusplus')
    for statement in statements(body):
        declare(statement, header)
    if not header.functions or set(header.enums) - set(header.aliases):
        raise NotUnderstoodError("no functions, or an enum without a fixed size")
    return header


def listing(before: str, items: list[str], after: str = "]") -> list[str]:
    """`before item, item after`, one line if it fits, as ruff would break it otherwise."""
    line = before + ", ".join(items) + after
    if len(line) <= WIDTH:
        return [line]
    indent = " " * (len(before) - len(before.lstrip()))
    return [before, *(f"{indent}    {item}," for item in items), indent + after]


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts c_uint8 before c_uint16."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def write(header: Header) -> str:
    """The text of `_binding.py`."""
    kinds = [k for result, params in header.functions.values() for k in (result, *(kind for _, kind in params))]
    kinds += [kind for fields in header.structs.values() for _, kind in fields]
    kinds += [k for result, params in header.callbacks.values() for k in (result, *params)]
    used = {name for kind in kinds for name in re.findall(r"c_\w+|POINTER", kind)}
    used |= {"CDLL", "Structure"} | ({"CFUNCTYPE"} if header.callbacks else set())
    # isort's order within one import: constants, classes, functions; digits count as numbers.
    names = sorted(used, key=lambda n: (0 if n.isupper() else 1 if n[0].isupper() else 2, natural(n)))
    out = [
        '"""The C header as ctypes declarations. Made by generate_binding.py from include/lycore.h; do not edit."""',
        "",
        "from __future__ import annotations",
        "",
        "from ctypes import (",
        *(f"    {name}," for name in names),
        ")",
        "from enum import IntEnum",
        "",
    ]
    out += [f"{name} = {value}" for name, value in header.constants]
    for name, values in header.enums.items():
        out += ["", "", f"class {name}(IntEnum):"]
        out += [f"    {constant} = {value}" for constant, value in values]
    for name, (result, params) in header.callbacks.items():
        out += ["", "", *listing(f"{name} = CFUNCTYPE(", [result, *params], ")")]
    for name, fields in header.structs.items():
        out += ["", "", f"class {name}(Structure):", "    _fields_ = ["]
        out += [f'        ("{field_name}", {kind}),' for field_name, kind in fields]
        out += ["    ]"]
    out += ["", "", "def declare(library: CDLL) -> None:"]
    out += ['    """Gives every function of the header its types; AttributeError when the library lacks one."""']
    for name, (result, params) in header.functions.items():
        out += [f"    library.{name}.restype = {result}"]
        out += listing(f"    library.{name}.argtypes = [", [kind for _, kind in params])
    out += [""]
    return "\n".join(out)


def main() -> int:
    parser = argparse.ArgumentParser(description="writes plugin/lycore/_binding.py from include/lycore.h")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the file is stale")
    check = parser.parse_args().check
    try:
        text = write(read(HEADER.read_text(encoding="utf-8")))
    except NotUnderstoodError as problem:
        print(f"{HEADER.name}: not understood: {problem}", file=sys.stderr)
        return 1
    if not check:
        BINDING.write_text(text, encoding="utf-8")
    elif not BINDING.exists() or BINDING.read_text(encoding="utf-8") != text:
        print(f"{BINDING.name} is stale: run plugin/generate_binding.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
