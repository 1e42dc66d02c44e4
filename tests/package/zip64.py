"""Archives in the form that files beyond 4 GB need."""

import struct

from alterations import END, stamp


def with_zip64(body):
    """The same with the wide end record that files beyond 4 GB need."""
    end = body.rindex(END)
    count, size, begin = struct.unpack("<HII", body[end + 10 : end + 20])
    wide = b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, size, begin)
    return stamp(body[:end] + wide + b"PK\6\7" + struct.pack("<IQI", 0, end, 1) + body[end:])
