"""A data format of one's own: a .csv of image paths and captions.

    image,caption
    cats/01.jpg,A cat on a sofa.

A source has a name, a tile limit, a length and records by number; it is pickled for data workers.
Wherever a path is expected a .csv then is one: as an 'annotation' of meta.json, in data.images.

    hovle train --config=configs/stage2_align.py:tiny --workdir=runs/csv \\
        --config.model.plugins="('examples/data_source.py',)" --config.data.meta=META.json ...
"""

import csv

from hovle_jax.data.rows import make_record
from hovle_jax.data.sources import FORMATS
from hovle_jax.errors import UserError


@FORMATS.add(".csv")
class CsvCaptions:
    def __init__(self, name, path, options):
        self.name, self.max_tiles = name, options.max_tiles
        self._path, self._options = path, options
        with open(path, newline="", encoding="utf-8") as file:
            self._rows = list(csv.DictReader(file))
        if not self._rows:
            raise UserError(f"{path}: the file has no rows")

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, i):
        where, o = f"{self._path}: row {i + 1}", self._options
        return make_record(self._rows[i], where, root=o.root, **o.of_rows)
