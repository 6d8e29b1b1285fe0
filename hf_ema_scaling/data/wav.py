"""Whether a WAV file is whole: decoders read one that was cut short as if it ended there."""

from __future__ import annotations

import os
import struct
from typing import BinaryIO

# Writers that cannot seek back (pipes) leave the largest size there is, or nearly that, or 0, for "unknown".
UNKNOWN_SIZE = 0x7FFF_0000


def missing_bytes(file: BinaryIO) -> int:
    """Bytes of sound that the header promises and the file does not hold.

    0 for a whole file, for one whose header does not know its length, and for anything that is not RIFF WAVE. The
    file is read from its current position, which is restored.
    """
    begin = file.tell()
    end = file.seek(0, os.SEEK_END)
    try:
        file.seek(begin)
        header = file.read(12)
        if header[:4] != b"RIFF" or header[8:] != b"WAVE":
            return 0
        while len(chunk := file.read(8)) == 8:
            name, size = struct.unpack("<4sI", chunk)
            if name == b"data":
                return 0 if size >= UNKNOWN_SIZE else max(0, size - (end - file.tell()))
            file.seek(size + size % 2, os.SEEK_CUR)
        return 0
    finally:
        file.seek(begin)
