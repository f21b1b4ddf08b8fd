"""A tiler of one's own: strips over the full width, from top to bottom, for pages and receipts.

    hovle train --config=configs/stage2_align.py:tiny --workdir=runs/strips \\
        --config.model.plugins="('examples/tiler.py',)" --config.data.tiler=strips ...

What was trained with it is chatted with and evaluated with it; an export says that it cannot.
"""

import math

import numpy as np

from hovle_jax.data.image import resize
from hovle_jax.data.tilers import TILERS


class Strips:
    def count(self, width, height, limits):
        return min(max(math.ceil(height / width), limits.least), limits.most)

    def cut(self, picture, limits):
        size, strips = limits.image_size, self.count(*picture.size, limits)
        pixels = np.asarray(resize(picture, size, strips * size))
        return pixels.reshape(strips, size, size, 3)


TILERS.add("strips")(Strips())
