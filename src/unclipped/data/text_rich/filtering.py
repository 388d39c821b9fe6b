"""Keep the text-rich samples of a source: every sample is scored once, scores are kept, indices follow from them.

Scores are those of the samples in the order of the source, whichever process asks, so that what is kept, and with it
every draw, is the same in all processes and workers and in a resumed run. They are kept in the cache folder under a
digest of the scorer and of the images (path, size and time of change of a file; the bytes of an image held in a row),
so that a source whose images changed is scored again. An interrupted pass goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from unclipped.core.errors import DataError, UsageError
from unclipped.core.files import cache_folder, read_array, write_array
from unclipped.core.progress import counting
from unclipped.data.config import TextRichFilter
from unclipped.data.sample import ImagePart, Sample
from unclipped.data.sources import SelectedSource, Source, image_key

if TYPE_CHECKING:
    from unclipped.data.text_rich.detector import TextRichScorer
    from unclipped.images.part import ImageSource

logger = logging.getLogger("unclipped.data")

NO_IMAGE = -1.0
"""Score of a sample without an image."""
_SAVE_EVERY = 256  # samples


def filtered(source: Source, config: TextRichFilter) -> SelectedSource:
    """The samples of a finite source that are text-rich, in their order.

    A sample with several images has the highest of their scores; one without an image is left out. One that cannot be
    read stays, so that reading it raises again and `on_bad_sample` governs it. Raises UsageError for an endless source,
    DataError when nothing is kept.
    """
    if source.length is None:
        raise UsageError(
            f"{source.name} is endless and cannot be filtered as it is; set limit: so many samples are then drawn and "
            "scored once, and those kept are gone through again and again"
        )
    scores = scores_of(source)
    kept = kept_of(scores, config)
    if not np.isfinite(scores[kept]).any():
        raise DataError(f"{source.name}: {_nothing(source, scores, config)}")
    _say(f"{source.name}: filter text_rich {told(scores, kept)}")
    return SelectedSource(source, kept, name=f"{source.name} [text_rich]")


def kept_of(scores: np.ndarray, config: TextRichFilter) -> np.ndarray:
    """Indices kept, rising. scores: (N,) as `scores_of` gives them.

    With a share, that share of the readable images, rounded; of equal scores the earlier sample is kept.
    """
    readable = np.flatnonzero(scores >= 0)
    if config.share is None:
        threshold = 0.5 if config.threshold is None else config.threshold
        chosen = readable[scores[readable] >= threshold]
    else:
        order = readable[np.argsort(-scores[readable], kind="stable")]
        chosen = order[: int(config.share * len(readable) + 0.5)]
    return np.sort(np.concatenate([chosen, np.flatnonzero(np.isnan(scores))]))


def told(scores: np.ndarray, kept: np.ndarray) -> str:
    """What a filter keeps, for people."""
    readable, chosen = int((scores >= 0).sum()), int((scores[kept] >= 0).sum())
    text = f"keeps {chosen:,} of {readable:,} images ({chosen / max(readable, 1):.1%})"
    if unread := int(np.isnan(scores).sum()):
        text += f"; {unread:,} that cannot be read stay, to raise when they are drawn"
    if bare := int((scores == NO_IMAGE).sum()):
        text += f"; {bare:,} without an image are left out"
    return text


def _nothing(source: Source, scores: np.ndarray, config: TextRichFilter) -> str:
    readable = np.flatnonzero(scores >= 0)
    if not len(readable):
        return (
            f"filter text_rich keeps nothing: of {len(scores):,} samples {int((scores == NO_IMAGE).sum()):,} have no "
            f"image and {int(np.isnan(scores).sum()):,} cannot be read; filter images, or leave filter out"
        )
    best = int(readable[np.argmax(scores[readable])])
    highest = f"the highest score is {scores[best]:.6g} (sample {source[best].id})"
    if config.share is not None:
        return (
            f"filter text_rich keeps nothing: share {config.share:g} of {len(readable):,} images is less than half of "
            f"one; {highest}; raise filter.share or give more data"
        )
    threshold = 0.5 if config.threshold is None else config.threshold
    return (
        f"filter text_rich keeps none of {len(readable):,} images: {highest}, below the threshold {threshold:g}; lower "
        "filter.threshold, set filter.share, or leave the source out"
    )


@lru_cache(maxsize=64)
def _say(text: str) -> None:
    """Print a line, once a process and only in the first of several."""
    if int(os.environ.get("RANK", "0")) == 0:
        Console(highlight=False, soft_wrap=True).print(text, markup=False)


def scores_of(source: Source) -> np.ndarray:
    """float32 (N,): the score of each sample of a finite source; NaN: cannot be read, `NO_IMAGE`: has none.

    From the cache, or by a pass that shows its progress and of several processes on one machine only one makes.
    """
    from unclipped.data.text_rich.detector import builtin_scorer

    scorer = builtin_scorer()
    score_of = _scoring(scorer)
    count = source.length or 0
    file = cache_folder("scores") / f"{_fingerprint(source, scorer.digest)}.npy"
    with _alone(file.with_suffix(".lock")) as can_keep:
        if can_keep and (kept := _read(file, count)) is not None:
            return kept
        interrupted = file.with_suffix(".part")
        scores = np.full(count, np.nan, dtype=np.float32)
        done = _resumed(interrupted, scores) if can_keep else 0
        is_first = int(os.environ.get("RANK", "0")) == 0
        console = Console(highlight=False, soft_wrap=True) if is_first else Console(file=io.StringIO())
        with counting(f"{source.name}: text_rich scores", count, done, console) as progress:
            for start in range(done, count, _SAVE_EVERY):
                stop = min(start + _SAVE_EVERY, count)
                for index in range(start, stop):
                    scores[index] = _score(lambda index=index: source[index], score_of)
                    progress.advance(1)
                if can_keep:
                    with open(interrupted, "ab") as stream:
                        stream.write(scores[start:stop].tobytes())
        if can_keep:
            write_array(file, scores)
            interrupted.unlink(missing_ok=True)
    return scores


def _scoring(scorer: TextRichScorer) -> Callable[[ImagePart], float]:
    """The score of an image; those of the last files are kept, as several questions may be about one image."""
    from unclipped.images.prepare import decoded

    def score(image: ImageSource, name: str) -> float:
        return scorer.score(decoded(ImagePart(image, name)))

    @lru_cache(maxsize=1024)
    def score_of_file(path: str | Path, name: str) -> float:
        return score(path, name)

    def score_of(part: ImagePart) -> float:
        if isinstance(part.source, str | Path):
            return score_of_file(part.source, part.label)
        return score(part.source, part.label)

    return score_of


def _score(sample: Callable[[], Sample], score_of: Callable[[ImagePart], float]) -> float:
    try:
        return max(map(score_of, sample().images), default=NO_IMAGE)
    except DataError as error:
        logger.warning("text_rich: %s", error)
        return float("nan")


def _fingerprint(source: Source, scorer: str) -> str:
    """A digest of the scorer and of every image of the source."""
    digest = hashlib.blake2b(scorer.encode(), digest_size=16)
    base: Any = source
    while hasattr(base, "source"):
        base = base.source
    files = getattr(base, "files", None)
    if files is not None:
        # Long files that hold their images: their state speaks for all of them, and the ids say which are taken.
        for path in files:
            status = os.stat(path)
            digest.update(f"{os.path.abspath(path)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        digest.update(_taken(source).tobytes())
        return digest.hexdigest()
    for index in range(source.length or 0):
        try:
            digest.update(_image_state(source[index]).encode("utf-8", "surrogateescape"))
        except (DataError, OSError) as error:
            digest.update(f"bad {error}".encode("utf-8", "surrogateescape"))
        digest.update(b"\n")
    return digest.hexdigest()


def _taken(source: Any) -> np.ndarray:
    """int64 (N,): the numbers in the innermost source of the samples of `source`."""
    if not hasattr(source, "source"):
        return np.arange(source.length, dtype=np.int64)
    inner = _taken(source.source)
    return inner[source.indices] if hasattr(source, "indices") else inner[: source.length]


def _image_state(sample: Sample) -> str:
    """Path, size and time of change of images in files; digests of others."""
    states = []
    for part in sample.images:
        if isinstance(part.source, str | Path):
            status = os.stat(part.source)
            states.append(f"{os.path.abspath(part.source)}\0{status.st_size}\0{status.st_mtime_ns}")
        else:
            states.append(image_key(Sample.picture(sample.id, part)))
    return "\0".join(states)


@contextmanager
def _alone(lock: Path) -> Iterator[bool]:
    """Wait until no other process of this machine scores the same; False when the cache folder cannot be written."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        stream = open(lock, "w")  # noqa: SIM115 - held while locked
    except OSError as error:
        logger.warning("%s cannot be written (%s): images are scored again in every run", lock.parent, error)
        yield False
        return
    try:
        try:
            import fcntl

            fcntl.flock(stream, fcntl.LOCK_EX)  # given back when the process ends, whatever ends it
        except ImportError:
            logger.info("no file locks here: processes that start together each score the images")
        yield True
    finally:
        stream.close()


def _read(file: Path, count: int) -> np.ndarray | None:
    """Scores from a file; None when it is not there or is damaged."""
    try:
        scores = read_array(file)
    except FileNotFoundError:
        return None
    except DataError as error:
        logger.warning("%s: the kept scores are damaged (%s) and are made again", file, error)
        return None
    return scores if scores.shape == (count,) and scores.dtype == np.float32 else None


def _resumed(partial: Path, scores: np.ndarray) -> int:
    """Fill in the scores of an interrupted pass; how many there are, in whole blocks."""
    try:
        found = np.frombuffer(partial.read_bytes()[: scores.nbytes // 4 * 4], dtype=np.uint8)
    except FileNotFoundError:
        return 0
    whole = len(found) // (4 * _SAVE_EVERY) * _SAVE_EVERY
    scores[:whole] = found[: 4 * whole].view(np.float32)
    with open(partial, "r+b") as stream:
        stream.truncate(4 * whole)  # what was written after it began in the middle of a block
    return whole
