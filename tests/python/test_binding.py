"""The checked-in binding says what the header says, and what a C compiler makes of it."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys

import pytest

from conftest import PLUGIN, ROOT
from lycore import _binding

GENERATOR = PLUGIN / "generate_binding.py"
HEADER = ROOT / "include" / "lycore.h"


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("generate_binding", GENERATOR)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_binding_is_fresh():
    done = subprocess.run([sys.executable, GENERATOR, "--check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_function_of_the_header_is_bound(generator):
    header = HEADER.read_text()
    declared = set(re.findall(r"^[a-z].*?\b(lycore_\w+)\(", header, re.M))
    assert len(declared) > 40
    assert set(generator.read(header).functions) == declared


def test_layouts_agree_with_the_c_compiler(generator, tmp_path):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc) on the PATH")
    read = generator.read(HEADER.read_text())
    lines, expected = [], []
    for name, fields in read.structs.items():
        struct = getattr(_binding, name)
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        expected.append(f"{name} {ctypes.sizeof(struct)}")
        for field, _ in fields:
            lines.append(
                f'printf("{name}.{field} %zu %zu\\n", offsetof({name}, {field}), sizeof((({name} *)0)->{field}));'
            )
            bound = getattr(struct, field)
            expected.append(f"{name}.{field} {bound.offset} {bound.size}")
    for name, value in [*read.constants, *(v for values in read.enums.values() for v in values)]:
        lines.append(f'printf("{name} %lld\\n", (long long){name});')
        expected.append(f"{name} {value}")
    lines.append('printf("status %zu\\n", sizeof(lycore_status));')
    expected.append(f"status {ctypes.sizeof(ctypes.c_int32)}")
    source = tmp_path / "layout.c"
    source.write_text(
        '#include <stddef.h>\n#include <stdio.h>\n#include "lycore.h"\n'
        f"int main(void) {{ {' '.join(lines)} return 0; }}\n"
    )
    program = tmp_path / "layout"
    subprocess.run([compiler, "-std=c99", f"-I{HEADER.parent}", source, "-o", program], check=True)
    assert subprocess.check_output([program], text=True).splitlines() == expected
    assert set(read.structs) == set(re.findall(r"^typedef struct (\w+) \{", HEADER.read_text(), re.M))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("lycore_status lycore_odd(union thing *x);", "type `union thing"),
        ("lycore_status lycore_odd(unsigned long x);", "type `unsigned long"),
        ("lycore_status lycore_odd(struct lycore_unknown *x);", "not declared"),
        ("typedef long lycore_number;", "typedef long"),
        ("#if LYCORE_SOMETHING", "#if LYCORE_SOMETHING"),
        ("#define LYCORE_NAME text", "#define LYCORE_NAME text"),
        ("static inline int lycore_odd(void) { return 0; }", "text after"),
    ],
)
def test_what_is_not_understood_is_an_error(generator, line, reason):
    text = HEADER.read_text()
    at = text.index("#ifdef __cplusplus\n}")
    with pytest.raises(generator.NotUnderstoodError, match=reason):
        generator.read(f"{text[:at]}{line}\n{text[at:]}")


def test_the_library_has_the_version_of_the_header(library):
    numbers = (_binding.LYCORE_VERSION_MAJOR, _binding.LYCORE_VERSION_MINOR, _binding.LYCORE_VERSION_PATCH)
    assert library.version == ".".join(map(str, numbers))
    assert library.capabilities()["version"] == library.version


def test_every_status_has_its_own_text_and_class(library):
    from lycore.errors import LycoreError, class_of

    texts = {status: library.functions.lycore_status_text(status) for status in _binding.lycore_status}
    assert len(set(texts.values())) == len(texts)
    assert b"unknown status" not in texts.values()
    assert library.functions.lycore_status_text(-1) == b"unknown status"
    for status in _binding.lycore_status:
        if status != _binding.lycore_status.LYCORE_OK:
            assert class_of(status) is not LycoreError
            assert class_of(status)("x", status=status).status == status
