"""Benchmarks of retrieval in their published layouts: CopyDays, revisited Oxford and Paris.

    benchmark = open_benchmark("copydays/")             # original/, strong/, crops/10/, ...
    benchmark = open_benchmark("roxford5k/")            # gnd_roxford5k.pkl, jpg/
    benchmark.queries, benchmark.database               # len(), [i] -> bytes, .name(i)
    positives, junk = benchmark.protocols["hard"][0]    # numbers in the database, of query 0

CopyDays (Douze et al., CIVR 2009): 157 originals, and attacks in folders of any depth beside
original/: jpeg/3, crops/10, strong, ... An attack's name is its original's, 2000.., with other
last two digits. Revisited Oxford and Paris (arXiv 1803.11285): `easy` looks for the easy images
and removes the hard from the ranking, `medium` looks for both, `hard` looks for the hard and
removes the easy; junk is always removed. Queries are not cut to their boxes (as VISSL's).
"""
import bisect
import os
import pickle
import re
from pathlib import Path
from typing import NamedTuple

from torch.utils.data import ConcatDataset

from data.images import Files, open_images

# numpy's arrays, under the names of its versions 1 and 2
_NUMPY = {(f"numpy.{core}.multiarray", name) for core in ("core", "_core")
          for name in ("_reconstruct", "scalar")} | {("numpy", "ndarray"), ("numpy", "dtype")}


class Truth(NamedTuple):
    """What is right for a query: numbers in the database."""
    positives: list[int] = []            # none: the query is not of the protocol
    junk: list[int] = []                 # neither right nor wrong


class Benchmark(NamedTuple):
    queries: object                      # len(), [i] -> bytes, .name(i)
    database: object
    protocols: dict[str, list[Truth]]    # of each query


class Joined(ConcatDataset):
    """The images of several sets, one set after the other, with their names."""

    def name(self, i: int) -> str:
        number = bisect.bisect_right(self.cumulative_sizes, i)
        return self.datasets[number].name(i - [0, *self.cumulative_sizes][number])


class _ArraysAlone(pickle.Unpickler):
    """Makes plain values and numpy's arrays; refuses all else, so nothing in a file is executed."""

    def find_class(self, module, name):
        if (module, name) == ("_codecs", "encode"):      # bytes, as Python 2 wrote them
            return lambda value, coding: value.encode(coding)
        if name == "bytes":                              # empty ones, as Python 3 writes them
            return lambda: b""
        if (module, name) not in _NUMPY:
            raise pickle.UnpicklingError(f"holds a {module}.{name}")
        return super().find_class(module, name)


def open_benchmark(source: str) -> Benchmark:
    """A folder in one of the published layouts. Raises ValueError for anything else."""
    if source and Path(source, "original").is_dir():
        return open_copydays(source)
    if len(truths := sorted(Path(source).glob("gnd_*.pkl")) if source else []) == 1:
        return open_revisited(source, truths[0])
    raise ValueError(f"{source or '--data'} has neither original/ (CopyDays) nor one gnd_*.pkl "
                     "(revisited Oxford and Paris); for images of your own add --attack")


def open_copydays(source: str) -> Benchmark:
    """A protocol for each folder of attacks, by its name below the source. Raises ValueError where
    there is none, and for an attack without an original."""
    database, everything = open_images(Path(source, "original")), open_images(source)
    original = {_block(database.name(i)): i for i in range(len(database))}
    names = [name for name in map(everything.name, range(len(everything)))
             if Path(name).parts[0] not in ("original", "distractors")]
    queries = Files(source, map(os.fsencode, names), f"no attacks beside {source}/original")
    protocols = {}
    for i, name in enumerate(names):
        if _block(name) not in original:
            raise ValueError(f"{Path(source, name)} has no original")
        truths = protocols.setdefault(Path(name).parent.as_posix(), [Truth()] * len(names))
        truths[i] = Truth([original[_block(name)]])
    return Benchmark(queries, database, protocols)


def _block(name: str) -> str:
    """The name without its last two digits."""
    return re.sub(r"\d\d$", "", Path(name).stem)


def open_revisited(source: str, truth: Path) -> Benchmark:
    """easy, medium and hard.  truth: the ground truth's file."""
    try:
        with open(truth, "rb") as file:
            content = _ArraysAlone(file, encoding="latin1").load()
        images, queries = ([os.path.join("jpg", f"{name}.jpg").encode() for name in content[key]]
                           for key in ("imlist", "qimlist"))
        lists = [{key: [int(i) for i in query[key]] for key in ("easy", "hard", "junk")}
                 for query in content["gnd"]]
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError, ValueError,
            OSError) as error:
        raise ValueError(f"{truth} is not the ground truth of revisited Oxford or Paris: "
                         f"{error}") from None
    if len(lists) != len(queries) or any(not 0 <= i < len(images) for query in lists
                                         for numbers in query.values() for i in numbers):
        raise ValueError(f"{truth} does not fit its own lists of images")
    easy, hard, junk = ([query[key] for query in lists] for key in ("easy", "hard", "junk"))
    protocols = {
        "easy": [Truth(e, j + h) for e, h, j in zip(easy, hard, junk)],
        "medium": [Truth(e + h, j) for e, h, j in zip(easy, hard, junk)],
        "hard": [Truth(h, j + e) for e, h, j in zip(easy, hard, junk)]}
    return Benchmark(Files(source, queries, f"{truth} has no queries"),
                     Files(source, images, f"{truth} has no images"), protocols)
