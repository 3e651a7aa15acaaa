"""Writes the malformed files of this folder, one per lie; the name says the lie.

    python3 tests/malformed/make.py            writes them
    python3 tests/malformed/make.py --check    exits with 1 when a file differs, is missing or is not from here

tests/integration/malformed.rs knows the answer to each. A file without an answer there fails that test.
"""

import json
import struct
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def file(header, data=b"", length=None):
    """A file with this header (text or bytes) and data; `length` overrides the header length that it claims."""
    header = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(dtype="U8", shape=(4,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def tensors(data=4, **entries):
    """A file with these entries and `data` bytes of data."""
    return file(json.dumps(entries, separators=(",", ":")), bytes(range(data)))


def raw(text, data=4):
    """A file with one tensor `w` whose entry is this text."""
    return file('{"w":%s}' % text, bytes(range(data)))


GOOD = '"dtype":"U8","shape":[4],"data_offsets":[0,4]'

LIES = {
    # The length field.
    "empty_file": b"",
    "shorter_than_the_length_field": b"\x02\0\0\0\0",
    "header_longer_than_file": file("{}", length=3),
    "header_of_90_megabytes": file("{}", length=90_000_000),
    "header_too_large": file("", length=100_000_001),
    "header_length_all_ones": file("{}", length=2**64 - 1),
    # The text.
    "header_not_utf8": file(b'{"w\xff":{}}'),
    "header_empty": file(""),
    "header_starts_with_space": file(" {}"),
    "header_is_a_list": file("[]"),
    "header_cut_in_the_middle": file('{"w":{"dtype":"U8","sha'),
    "header_without_quotes": file("{w:{}}"),
    "text_after_the_header": file("{}{}"),
    "lone_surrogate_in_a_name": file(r'{"\ud800":{%s}}' % GOOD, bytes(4)),
    "nested_lists": raw('{"x":' + "[" * 400),
    # Names that stand twice.
    "tensor_twice": file('{"w":{%s},"v":{%s},"w":{%s}}' % (GOOD, GOOD, GOOD), bytes(4)),
    "tensor_twice_by_escape": file(r'{"one":{%s},"\u006fne":{%s}}' % (GOOD, GOOD), bytes(4)),
    "metadata_twice": file('{"__metadata__":{},"__metadata__":{}}'),
    "metadata_key_twice": file('{"__metadata__":{"k":"1","k":"2"}}'),
    "dtype_twice": raw('{"dtype":"F32",%s}' % GOOD),
    "shape_twice": raw('{"shape":[4],%s}' % GOOD),
    "offsets_twice": raw('{%s,"data_offsets":[0,4]}' % GOOD),
    "unknown_field_twice": raw('{%s,"x":1,"x":2}' % GOOD),
    # Metadata.
    "metadata_is_a_list": file('{"__metadata__":["k","v"]}'),
    "metadata_is_null": file('{"__metadata__":null}'),
    "metadata_holds_a_number": file('{"__metadata__":{"ss_rank":8}}'),
    "metadata_holds_a_map": file('{"__metadata__":{"k":{}}}'),
    "metadata_is_a_tensor": tensors(__metadata__=entry()),
    # One tensor's entry.
    "entry_is_a_list": raw('["U8",[4],[0,4]]'),
    "entry_is_null": raw("null"),
    "entry_without_dtype": raw('{"shape":[4],"data_offsets":[0,4]}'),
    "entry_without_shape": raw('{"dtype":"U8","data_offsets":[0,4]}'),
    "entry_without_offsets": raw('{"dtype":"U8","shape":[4]}'),
    "dtype_is_a_number": raw('{"dtype":8,"shape":[4],"data_offsets":[0,4]}'),
    "dtype_unknown": tensors(w=entry(dtype="F12")),
    "dtype_in_lower_case": tensors(w=entry(dtype="u8")),
    "shape_is_a_number": raw('{"dtype":"U8","shape":4,"data_offsets":[0,4]}'),
    "shape_negative": tensors(w=entry(shape=(-4,))),
    "shape_fractional": tensors(w=entry(shape=(4.0,))),
    "shape_of_text": tensors(w=entry(shape=("4",))),
    "shape_past_64_bits": tensors(w=entry(shape=(2**64 + 4,))),
    "shape_of_65_axes": tensors(1, w=entry(shape=(1,) * 65, offsets=(0, 1))),
    "offsets_only_one": tensors(w=entry(offsets=(4,))),
    "offsets_three": tensors(w=entry(offsets=(0, 4, 4))),
    "offset_negative": tensors(w=entry(offsets=(-1, 3))),
    "offset_fractional": tensors(w=entry(offsets=(0, 4.5))),
    # Sizes.
    "elements_past_64_bits": tensors(w=entry(shape=(2**32, 2**32))),
    "bits_past_64_bits": tensors(w=entry(dtype="F64", shape=(2**60,))),
    "elements_2_to_the_60": tensors(w=entry(shape=(2**60,))),
    "elements_and_offsets_2_to_the_60": tensors(w=entry(shape=(2**60,), offsets=(0, 2**60))),
    "shape_larger_than_offsets": tensors(w=entry(shape=(5,))),
    "shape_smaller_than_offsets": tensors(w=entry(shape=(3,))),
    "scalar_without_bytes": tensors(0, w=entry(dtype="F32", shape=(), offsets=(0, 0))),
    "half_byte_left": tensors(2, w=entry(dtype="F4", shape=(3,), offsets=(0, 2))),
    # Offsets.
    "offsets_reversed": tensors(w=entry(offsets=(4, 0))),
    "offset_wraps_around": tensors(w=entry(offsets=(2**64 - 4, 0))),
    "ends_after_file": tensors(w=entry(shape=(6,), offsets=(0, 6))),
    "data_cut_off": tensors(7, v=entry(), w=entry(offsets=(4, 8))),
    "begins_after_file": tensors(v=entry(), w=entry(shape=(0,), offsets=(1000, 1000))),
    "overlap_by_one_byte": tensors(7, v=entry(), w=entry(offsets=(3, 7))),
    "same_bytes_twice": tensors(left=entry(), right=entry()),
    "empty_tensor_inside_another": tensors(v=entry(), empty=entry(shape=(0,), offsets=(2, 2))),
    "gap_before_the_first": tensors(5, w=entry(offsets=(1, 5))),
    "gap_between_two": tensors(10, v=entry(), w=entry(offsets=(6, 10))),
    "trailing_byte": tensors(5, w=entry()),
    "bytes_without_tensors": file("{}", bytes(3)),
}


def main():
    wanted = {f"{name}.safetensors": content for name, content in LIES.items()}
    assert all(len(content) < 1024 for content in wanted.values())
    if sys.argv[1:] == ["--check"]:
        present = {path.name: path.read_bytes() for path in HERE.glob("*.safetensors")}
        stale = sorted(n for n in wanted.keys() | present.keys() if wanted.get(n) != present.get(n))
        for name in stale:
            print(f"{HERE / name}: not what make.py writes")
        sys.exit(bool(stale))
    for name, content in wanted.items():
        (HERE / name).write_bytes(content)
    print(f"{len(wanted)} files in {HERE}")


if __name__ == "__main__":
    main()
