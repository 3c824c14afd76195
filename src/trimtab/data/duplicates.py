"""Near duplicates: MinHash candidates on character 5-grams, confirmed by their Jaccard similarity."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.data.rows import Row

SIMILARITY = 0.8
_PERMUTATIONS = 64
_SHINGLE = 5


def _shingles(row: Row) -> frozenset[bytes]:
    text = " ".join(f"{row.text} {row.text_pair or ''}".lower().split())
    return frozenset(text[i : i + _SHINGLE].encode() for i in range(max(1, len(text) - _SHINGLE + 1)))


def _jaccard(a: frozenset[bytes], b: frozenset[bytes]) -> float:
    return len(a & b) / len(a | b)


def find_near_duplicates(train: Sequence[Row], test: Sequence[Row]) -> tuple[int, set[str]]:
    """Rows of train that repeat an earlier one, and ids of test rows that train already holds.

    Broder, On the resemblance and containment of documents (1997): MinHash; here it only
    proposes, and pairs count from a true Jaccard similarity of 0.8.
    """
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=SIMILARITY - 0.1, num_perm=_PERMUTATIONS)
    seen: dict[str, frozenset[bytes]] = {}
    repeated = 0
    leaked: set[str] = set()
    shingled = [(row, _shingles(row)) for row in (*train, *test)]
    hashes = MinHash.bulk((shingles for _, shingles in shingled), num_perm=_PERMUTATIONS, seed=1)
    for position, ((row, shingles), minhash) in enumerate(zip(shingled, hashes, strict=True)):
        is_repeat = any(_jaccard(shingles, seen[other]) >= SIMILARITY for other in index.query(minhash))
        if position >= len(train):
            if is_repeat:
                leaked.add(row.id)
        elif is_repeat:
            repeated += 1
        else:
            seen[row.id] = shingles
            index.insert(row.id, minhash)
    return repeated, leaked
