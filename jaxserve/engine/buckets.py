"""The static shapes that slices are padded to: how many programs there are, and which one runs."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """The static shape of one program: rows and prompt tiles (0: no prompts, decode only)."""

    rows: int
    tiles: int


def row_buckets(max_rows: int) -> list[int]:
    """1, 8, 16, 32 ... up to `max_rows`: rows are padded to the next."""
    sizes = [1]
    size = 8
    while size < max_rows:
        sizes.append(size)
        size *= 2
    return sorted({*(s for s in sizes if s < max_rows), max_rows})


def tile_buckets(max_tiles: int) -> list[int]:
    """Prompt tiles of a mixed step: powers of two down from the token budget. Of four, with a third
    fewer programs, padding was more than half of what prompts cost."""
    sizes = [max_tiles]
    while sizes[-1] > 4:
        sizes.append(-(-sizes[-1] // 2))
    return sorted(sizes)


def make_buckets(max_rows: int, max_tiles: int) -> tuple[Bucket, ...]:
    """All programs of a deployment: decode only for each row bucket, and mixed ones.

    Mixed steps come with fewer row buckets, since prompts dominate their time.
    """
    rows = row_buckets(max_rows)
    mixed = sorted({rows[0], *rows[1:-1][1::2], rows[-1]})
    decode = [Bucket(r, 0) for r in rows]
    return (*decode, *(Bucket(r, t) for r in mixed for t in tile_buckets(max_tiles)))


class Buckets:
    """The programs of a deployment; chunks of prompts are rounded up to tiles of `tile` tokens."""

    def __init__(self, buckets: Iterable[Bucket], *, tile: int):
        self._buckets = sorted(buckets)
        self.tile = tile
        self._found: dict[tuple[int, int], Bucket] = {}

    @property
    def most_tiles(self) -> int:
        return max((bucket.tiles for bucket in self._buckets), default=0)

    def smallest(self, rows: int, chunks: Iterable[int]) -> Bucket:
        """The smallest program that holds so many rows and prompt chunks of so many tokens.

        Raises ValueError when none does.
        """
        tiles, tile = 0, self.tile
        for size in chunks:
            tiles += -(-size // tile)
        found = self._found.get((rows, tiles))
        if found is None:
            found = self._found[rows, tiles] = self._smallest(rows, tiles)
        return found

    def _smallest(self, rows: int, tiles: int) -> Bucket:
        for bucket in self._buckets:
            enough = bucket.rows >= rows and bucket.tiles >= tiles
            if enough and (bucket.tiles > 0) == (tiles > 0):
                return bucket
        raise ValueError(
            f"a slice of {rows} rows and {tiles} prompt tiles fits no program;"
            f" the largest is {self._buckets[-1]}"
        )
