"""Bytes per pixel that decoding takes at its peak, by file format and colours (Linux only).

    python docs/benchmarks/decoding_memory.py [--side 3000]

Each file is decoded to 8-bit RGB at full size in a process of its own. The peak is the growth of
the resident set's high-water mark above what it was before the file was opened. These figures are
behind the bound of 1 GB an image, which sktransfer checks from a file's header.
"""

import argparse
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
from _report import save
from PIL import Image, features

FILES = {
    "JPEG, RGB": ("RGB", {}),
    "JPEG, RGB, progressive": ("RGB", {"progressive": True, "subsampling": 0}),
    "JPEG, RGB, on its side": ("RGB", {"exif": 6}),
    "JPEG, CMYK": ("CMYK", {}),
    **{f"PNG, {mode}": (mode, {}) for mode in ("1", "L", "P", "LA", "RGB", "RGBA", "I;16")},
    "PNG, RGBA of 16 bits": ("16", {}),
    "GIF, P": ("P", {}),
    "GIF, P, transparent": ("P", {"transparency": 0}),
    "WEBP, RGB": ("RGB", {}),
    "WEBP, RGBA": ("RGBA", {"lossless": True}),
    "BMP, RGB": ("RGB", {}),
    **{f"TIFF, {mode}": (mode, {}) for mode in ("RGB", "RGBA", "CMYK", "I;16", "I", "F")},
    "JPEG2000, RGB": ("RGB", {}),
    "JPEG2000, RGBA": ("RGBA", {}),
    "AVIF, RGB": ("RGB", {"speed": 10}),
    "AVIF, RGBA": ("RGBA", {"speed": 10}),
    "PPM, RGB": ("RGB", {}),
    "PPM, F": ("F", {}),
}
DECODE = """
import sys
from PIL import Image
from sktransfer.images._images import as_images

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

Image.init()
cell = as_images([sys.argv[1]]).read(0)
open("/proc/self/clear_refs", "w").write("5")  # the mark is what is resident now
before = peak()
cell.decode()
print((peak() - before) * 1024)
"""


def crc(chunk):
    return struct.pack(">L", zlib.crc32(chunk))


def write(path, name, side):
    mode, options = FILES[name]
    if mode == "16":  # Pillow does not write it
        rows = zlib.compress((b"\0" + bytes(8 * side)) * side)
        header = struct.pack(">LLBBBBB", side, side, 16, 6, 0, 0, 0)
        chunks = [b"IHDR" + header, b"IDAT" + rows, b"IEND"]
        framed = [struct.pack(">L", len(c) - 4) + c + crc(c) for c in chunks]
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(framed))
        return
    if "exif" in options:
        exif = Image.Exif()
        exif[0x0112] = options["exif"]
        options = {"exif": exif}
    if mode in ("I;16", "I", "F"):
        dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        image = Image.fromarray(np.arange(side**2).reshape(side, side).astype(dtype))
    else:
        image = Image.new(mode, (side, side))
    image.save(path, name.split(",")[0], **options)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=3000)
    side = parser.parse_args().side
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in FILES:
            if name.startswith("AVIF") and not features.check("avif"):
                continue
            path = Path(folder, "file")
            write(path, name, side)
            command = [sys.executable, "-c", DECODE, str(path)]
            n_bytes = int(subprocess.run(command, capture_output=True, check=True).stdout)
            figures[name] = round(n_bytes / side**2, 1)
            print(f"{name:24} {figures[name]:6} bytes per pixel")
    save("decoding_memory", figures)


if __name__ == "__main__":
    main()
