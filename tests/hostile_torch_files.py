"""Hostile ``.pth`` files, one telling name each.

``EXECUTING`` and ``BAD`` are pickles for an otherwise good file, ``BOMBS`` pickles that are made
when needed, ``ZIPS`` and ``FOREIGN`` whole files.
"""

from __future__ import annotations

import gzip
import pickle
import struct
import zlib
from collections.abc import Iterator

from tests.hostile_torch_parts import (
    DATA,
    HOOKS,
    Record,
    call,
    checkpoint,
    name,
    number,
    pack,
    proto,
    state,
    storage,
    tensor,
    text,
    tuple_of,
    view,
    with_entry,
)

TOUCH = "touch EXECUTED"  # relative: a test looks for it in its own working directory
EVAL = text(f"__import__('os').system({TOUCH!r})")
SYSTEM = call("os.system", text(TOUCH))
MAP = name("builtins.map") + tuple_of(name("os.system"), b"(" + text(TOUCH) + pickle.LIST)
MAPPED = name("builtins.tuple") + MAP

EXECUTING = {
    "os_system_by_reduce": proto(SYSTEM),
    "eval_by_reduce": proto(call("builtins.eval", EVAL)),
    "os_system_by_stack_global": proto(
        text("os") + text("system") + pickle.STACK_GLOBAL + tuple_of(text(TOUCH)) + b"R"
    ),
    "os_system_by_inst": proto(b"(" + text(TOUCH) + pickle.INST + b"os\nsystem\n"),
    "map_by_newobj": proto(MAPPED + pickle.NEWOBJ + pickle.TUPLE1 + pickle.NEWOBJ),
    "os_system_as_a_value": state(text("w"), SYSTEM),
    "os_system_in_the_metadata": proto(HOOKS + b"}" + text("_metadata") + SYSTEM + b"sb"),
}

V2, V3 = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"
MODULE_ID = (text("module"), name("torch.FloatStorage"), text("0"), text("cpu"), number(4))

BAD = {
    "a_persistent_id_of_a_module": view(0, (4,), (1,), tuple_of(*MODULE_ID) + b"Q"),
    "a_storage_typed_by_a_function": view(0, (4,), (1,), storage(V2)),
    "a_storage_key_that_is_a_number": view(0, (4,), (1,), storage(key=number(0))),
    "a_storage_key_that_climbs": view(0, (4,), (1,), storage(key=text("../data.pkl"))),
    "a_storage_count_below_zero": view(0, (4,), (1,), storage(count=-4)),
    "a_storage_count_above_its_bytes": view(0, (4,), (1,), storage(count=5)),
    "a_tensor_called_with_a_list": state(text("w"), name(V2) + b"]R"),
    "a_call_of_a_string": proto(text("os.system") + tuple_of(text(TOUCH)) + b"R"),
    "a_global_without_an_end": b"\x80\x02ccollections\nOrderedDict",
    "an_unknown_opcode": proto(b"\xff"),
    "a_negative_offset": view(-1),
    "an_offset_past_the_end": view(1),
    "sizes_that_wrap_to_zero": view(0, (1 << 32, 1 << 32), (0, 0)),
    "an_empty_tensor_with_huge_sizes": view(0, (0, *[2**31 - 1] * 4), (1,) * 5),
    "a_zero_stride": view(0, (1 << 30,), (0,)),
    "a_negative_stride": view(3, (4,), (-1,)),
    "nine_dimensions": view(0, (1,) * 9, (1,) * 9),
    "a_deep_tuple_as_a_key": state(b")" + pickle.TUPLE1 * 50_000, tensor()),
    "a_number_as_a_name": state(number(1), tensor()),
    "a_name_with_half_a_surrogate": state(text("\ud800"), tensor()),
    "a_dictionary_in_itself": proto(b"}q\x00" + text("w") + b"h\x00s"),
    "items_for_a_tuple": proto(b")" + number(1) + number(2) + b"s"),
    "a_memo_that_was_never_written": proto(b"h\x05"),
    "a_group_without_a_mark": proto(b"t"),
    "an_integer_of_2_gigabytes": proto(pickle.LONG4 + b"\xff\xff\xff\x7f"),
    "a_string_of_8_exabytes": proto(pickle.BINUNICODE8 + b"\xff" * 7 + b"\x7f"),
}


CAP = 1 << 20  # the most bytes of pickle that the reader takes


def filled(start: bytes, repeated: bytes, end: bytes = b".") -> bytes:
    """As many repetitions as the cap allows."""
    return start + repeated * ((CAP - len(start) - len(end)) // len(repeated)) + end


BOMBS = {
    "a_pickle_above_the_cap": lambda: state() + b"." * (CAP + 1),
    "one_million_nested_tuples": lambda: filled(b"\x80\x02)", pickle.TUPLE1),
    "one_million_dictionaries_on_the_stack": lambda: filled(b"\x80\x02", b"}"),
    "one_million_memos": lambda: filled(b"\x80\x04}", pickle.MEMOIZE),
    "a_string_doubled_by_the_memo": lambda: filled(
        b"\x80\x02]" + text("a" * 100_000) + b"q\x00a", b"h\x00a"
    ),
}


GOOD = state()
ROWS = Record("archive/data.pkl", GOOD), Record("archive/data/0", DATA)
BOMB = zlib.compressobj(9, zlib.DEFLATED, -15)
DEFLATED = BOMB.compress(bytes(50 << 20)) + BOMB.flush()
WIDE = 0xFFFFFFFF


ZIPS = {
    "a_deflated_bomb": with_entry(data=DEFLATED, method=8, size=50 << 20, packed=len(DEFLATED)),
    "a_deflated_bomb_called_stored": with_entry(data=DEFLATED, size=50 << 20, packed=len(DEFLATED)),
    "a_size_below_the_data": with_entry(size=8),
    "a_zip64_size_of_exabytes": with_entry(
        size=WIDE, extra=struct.pack("<2H2Q", 1, 16, 1 << 62, 1 << 62)
    ),
    "a_wrong_crc": with_entry(crc=1),
    "another_name_in_the_header": with_entry(local_name="archive/data/1"),
    "a_header_offset_past_the_end": with_entry(header=WIDE - 1),
    "a_name_with_a_nul": pack([*ROWS, Record("archive/data/0\0", b"")]),
    "a_name_twice": pack([*ROWS, ROWS[1]]),
    "a_wrong_byte_order": pack([*ROWS, Record("archive/byteorder", b"middle")]),
    "no_pickle": pack([ROWS[1]]),
    "bytes_before_the_zip": b"#!/bin/sh\n" + pack(ROWS),
    "torchscript": pack([*ROWS, Record("archive/constants.pkl", b"\x80\x02).")]),
    "sixty_thousand_entries": pack(
        [*ROWS, *(Record(f"archive/data/{i}", b"") for i in range(1, 60_000))]
    ),
}


MAGIC = 0x1950A86A20F9469CFC6C
FOREIGN = {
    "an_empty_file": b"",
    "a_git_lfs_pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    "gzip": gzip.compress(checkpoint(GOOD)),
    "the_format_before_1_6": pickle.dumps(MAGIC, 2) + pickle.dumps(1001, 2),
    "a_bare_pickle": EXECUTING["os_system_by_reduce"],
    "a_safetensors_file": struct.pack("<Q", 2) + b"{}",
}


def hostile_files(bombs: bool = True) -> Iterator[tuple[str, bytes]]:
    """Every hostile file, one at a time: its name and its bytes."""
    for kind, pickles in (("executing", EXECUTING), ("bad", BAD)):
        yield from ((f"{kind}-{key}", checkpoint(value)) for key, value in pickles.items())
    if bombs:
        yield from ((f"bomb-{key}", checkpoint(make())) for key, make in BOMBS.items())
    for kind, files in (("zip", ZIPS), ("foreign", FOREIGN)):
        yield from ((f"{kind}-{key}", value) for key, value in files.items())
