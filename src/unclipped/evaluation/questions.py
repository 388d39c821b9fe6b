"""The items of a task: its samples with prompt texts added, images kept, removed or blanked, and their gold answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from unclipped.core.errors import DataError, UsageError
from unclipped.data.blank import with_blank_images
from unclipped.data.config import SourceConfig
from unclipped.data.sample import Part, Sample, TextPart, Turn
from unclipped.data.sources import LimitedSource, Source, open_source
from unclipped.evaluation.config import TaskConfig
from unclipped.evaluation.predictions import Prediction
from unclipped.evaluation.text import normalise

Images = Literal["kept", "removed", "blank"]


def open_task(task: TaskConfig) -> Source:
    """The task's source, cut to its limit. Raises UsageError for an endless one without limit, DataError for none."""
    source = open_source(task.source)
    if task.limit is not None:
        source = LimitedSource(source, task.limit)
    if source.length is None:
        raise UsageError(f"task {task.name}: {source.name} is endless; set the task's `limit`")
    if source.length == 0:
        raise DataError(f"task {task.name}: {source.name} has no sample to evaluate")
    return source


def as_prompt(sample: Sample, task: TaskConfig) -> Sample:
    """The sample up to its last question, with the task's prefix before and its suffix after the question's text.

    Raises DataError when the sample asks nothing.
    """
    places = [place for place, turn in enumerate(sample.turns) if turn.role == "user"]
    if not places:
        raise DataError(f"task {task.name}, sample {sample.id}: has no user turn, so nothing is asked")
    last = places[-1]
    question = _framed(sample.turns[last], task.prompt_prefix, task.prompt_suffix)
    return replace(sample, turns=(*sample.turns[:last], question))


def _framed(turn: Turn, prefix: str, suffix: str) -> Turn:
    parts: list[Part] = list(turn.parts)
    texts = [place for place, part in enumerate(parts) if isinstance(part, TextPart)]
    if not texts:
        return replace(turn, parts=(*parts, TextPart(prefix + suffix))) if prefix + suffix else turn
    for place, before, after in ((texts[0], prefix, ""), (texts[-1], "", suffix)):
        part = parts[place]
        assert isinstance(part, TextPart)
        parts[place] = TextPart(before + part.text + after)
    return replace(turn, parts=tuple(parts))


def with_images_as(sample: Sample, images: Images, image_processor: Any) -> Sample:
    """The sample as this arm sees it. `blank`: every image becomes one of its size in the processor's mean colour."""
    if images == "kept":
        return sample
    if images == "removed":
        return sample.without_images()
    blank = with_blank_images(sample, image_processor.mean)
    assert isinstance(blank, Sample)  # of a sample comes a sample, of a group a group
    return blank


def gold_of(sample: Sample, task: TaskConfig) -> tuple[str, ...]:
    """The accepted answers. Raises DataError naming the sample when there is none but empty text."""
    is_answered = bool(sample.turns) and sample.turns[-1].role == "assistant"  # not an earlier question alone
    answers = sample.answers or ((sample.answer,) if is_answered and sample.answer else ())
    if not any(answer.strip() for answer in answers):
        raise DataError(f"task {task.name}, sample {sample.id}: has no gold answer; add `answer` or `answers`")
    return tuple(answers)


def answers_in(source: SourceConfig) -> set[str]:
    """All gold answers of a training source, case-folded. Raises UsageError for an endless one."""
    opened = open_source(source)
    if opened.length is None:
        raise UsageError(f"unseen_answers_of: {opened.name} is endless; set its limit")
    found: set[str] = set()
    for index in range(opened.length):
        sample = opened[index]
        found.update(normalise(answer) for answer in (*sample.answers, sample.answer) if answer)
    return found


def cluster_of(sample: Sample) -> str | None:
    """The cluster of a sample: its own, else its image files, since questions about one image are not independent.

    Images that are no files count as seen once; None then: the sample stands alone.
    """
    if sample.cluster is not None:
        return sample.cluster
    names = [Path(part.source).name for part in sample.images if isinstance(part.source, str | Path)]
    return "images " + " ".join(names) if names and len(names) == len(sample.images) else None


def record(
    index: int,
    sample: Sample,
    task: TaskConfig,
    prediction: str,
    known_answers: set[str] | None,
    unanswered: str | None = None,
) -> Prediction:
    """What is kept of an item. An answer is unseen when none of its accepted forms is among `known_answers`.

    unanswered: why the model was not asked.
    """
    answers = gold_of(sample, task)
    held_out = sample.metadata.get("held_out")
    unseen = None if known_answers is None else not any(normalise(answer) in known_answers for answer in answers)
    return Prediction(
        index=index,
        id=sample.id,
        question=sample.question,
        answers=answers,
        prediction=prediction,
        choices=tuple(sample.choices or ()),
        category=sample.category,
        cluster=cluster_of(sample),
        held_out=None if held_out is None else bool(held_out),
        answer_unseen=unseen,
        unanswered=unanswered,
    )
