#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0 OR MIT
"""Makes the disk that the image benchmark copies.

Usage: disk.py PATH [GIB]

GIB (8) gibibytes, half of them holes: stretches of 1 to 64 MiB of data and of nothing in
turn. Of the data, half are files of /usr as they are, a quarter text, an eighth random
bytes, an eighth zeroes that were written. The same machine makes the same disk.
"""

import os
import random
import sys

MIB = 1 << 20
DICTIONARY = (
    b"the quick brown fox jumps over a lazy dog while systemd starts network targets "
    b"kernel info warning error daemon session opened closed for user root by uid address "
).split()


def files_of_usr():
    """Bytes of the files below /usr, one after the other, for ever."""
    while True:
        for folder, names, files in os.walk("/usr"):
            names.sort()
            for name in sorted(files):
                path = os.path.join(folder, name)
                if os.path.isfile(path) and not os.path.islink(path):
                    try:
                        with open(path, "rb") as file:
                            while piece := file.read(MIB):
                                yield piece
                    except OSError:
                        continue


class Stream:
    """Cuts pieces of any length out of a generator's."""

    def __init__(self, pieces):
        self.pieces = pieces
        self.rest = bytearray()

    def take(self, length: int) -> bytes:
        while len(self.rest) < length:
            self.rest += next(self.pieces)
        taken = bytes(self.rest[:length])
        del self.rest[:length]
        return taken


def text(dice: random.Random) -> bytes:
    words = dice.choices(DICTIONARY, k=MIB // 12)
    stamps = (b"%08x" % dice.getrandbits(32) for _ in range(len(words) // 12))
    lines = (b" ".join(words[at : at + 11]) for at in range(0, len(words), 12))
    return b"\n".join(b"%s %s" % pair for pair in zip(stamps, lines))


def main() -> None:
    path = sys.argv[1]
    size = int(sys.argv[2]) if len(sys.argv) > 2 else 8
    dice = random.Random(20)
    usr = Stream(files_of_usr())
    texts = Stream(iter(lambda: text(dice), b""))
    with open(path, "wb") as disk:
        disk.truncate(size << 30)
        at, end = 0, size << 30
        while at < end:
            # The file systems that disks hold allocate blocks of 4 KiB, not megabytes.
            length = min(dice.randrange(256, 64 * 256) * 4096, end - at)
            kind = dice.randrange(8)
            disk.seek(at)
            for start in range(0, length, MIB):
                part = min(MIB, length - start)
                if kind < 4:
                    disk.write(usr.take(part))
                elif kind < 6:
                    disk.write(texts.take(part))
                elif kind < 7:
                    disk.write(dice.randbytes(part))
                else:
                    disk.write(bytes(part))
            at += length
            at += dice.randrange(256, 64 * 256) * 4096


if __name__ == "__main__":
    main()
