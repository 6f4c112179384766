"""Decode mutated image files: `python benchmarks/fuzz_images.py [N] [SEED]`.

Each of N files is an image of some mode and format, of which bytes were changed, cut, repeated or
replaced. A file must be decoded or be given a reason, within seconds and bounded memory; anything
else that happens is a fault. Prints one line of counts, and exits with 1 where there is a fault.
"""

import hashlib
import io
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from core.data.decode import FORMATS, View
from core.data.image_store import build_stores
from core.data.sources import LabelledImage

_MODES = {
    "JPEG": ("RGB", "L", "CMYK"),
    "PNG": ("RGB", "L", "RGBA", "P", "1", "I;16", "LA"),
    "TIFF": ("RGB", "L", "I;16", "F", "CMYK", "1"),
    "GIF": ("P", "L"),
    "BMP": ("RGB", "L"),
    "WEBP": ("RGB", "RGBA"),
    "PPM": ("RGB", "L"),
    "AVIF": ("RGB",),
}
_MOST_S = 20.0
_MOST_MB = 9500  # a header may claim just below a gigapixel, which takes up to 9 bytes each
_BATCH = 50


def _whole(rng: np.random.Generator) -> bytes:
    kind = str(rng.choice([kind for kind in _MODES if kind in FORMATS]))
    mode = str(rng.choice(_MODES[kind]))
    height, width = rng.integers(1, 200, 2)
    grey = Image.fromarray(rng.integers(0, 255, (height, width), dtype=np.uint8))
    image = Image.new(mode, grey.size, 9) if mode in ("I;16", "F") else grey.convert(mode)
    exif = bytes(rng.integers(0, 255, 20, dtype=np.uint8)) if rng.random() < 0.3 else b""
    buffer = io.BytesIO()
    image.save(
        buffer, kind, **({"exif": exif} if exif and kind in ("JPEG", "PNG", "WEBP") else {})
    )
    return buffer.getvalue()


def _mutated(rng: np.random.Generator) -> bytes:
    found = bytearray(_whole(rng))
    for _ in range(rng.integers(1, 8)):
        at, n = int(rng.integers(len(found))), int(rng.integers(1, 9))
        how = rng.integers(5)
        if how == 0:
            found[at : at + n] = bytes(rng.integers(0, 256, n, dtype=np.uint8))
        elif how == 1:
            found[at] ^= 1 << int(rng.integers(8))
        elif how == 2 and rng.random() < 0.3:
            del found[at:]
        elif how == 3:
            found[at:at] = found[at : at + 8 * n]
        else:  # sizes stand near the beginning
            found[int(rng.integers(min(64, len(found) or 1)))] = int(rng.choice([0, 127, 255]))
        found = found or bytearray(b"\0")
    return bytes(found)


def main(n: int = 2000, seed: int = 0) -> int:
    """Decode n mutated files and say what became of them."""
    counts: Counter[str] = Counter()
    begin = time.perf_counter()
    for first in range(0, n, _BATCH):
        made = [_mutated(np.random.default_rng((seed, first + k))) for k in range(_BATCH)]
        with tempfile.TemporaryDirectory() as folder:
            images = []
            for k, encoded in enumerate(made):
                path = Path(folder, f"{k}.img")
                path.write_bytes(encoded)
                content = hashlib.sha256(encoded).hexdigest()
                images.append(LabelledImage(content, path.name, lambda p=path: p, "a"))
            started = time.perf_counter()
            kinds = [60, View(48, 56, "bicubic")]
            try:
                store = build_stores(images, kinds, Path(folder), None, (0, 255))[0]
            except Exception as err:  # a fault, to be counted
                counts[f"FAULT {type(err).__name__}: {err}"] += 1
                continue
            counts["decoded"] += len(store)
            counts["refused with a reason"] += len(store.broken)
            if time.perf_counter() - started > _MOST_S:
                counts["FAULT slow"] += 1
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    if peak_mb > _MOST_MB:
        counts["FAULT memory"] += 1
    spent = time.perf_counter() - begin
    print(f"seed {seed}: {dict(counts)}, peak {peak_mb:,.0f} MB, {spent:.0f} s")
    return int(any(name.startswith("FAULT") for name in counts))


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
