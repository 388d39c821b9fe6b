"""From scored predictions to figures with intervals: overall, per category, per group, and paired differences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unclipped.core.documents import read_json
from unclipped.core.errors import DataError
from unclipped.evaluation.config import EvaluationConfig, TaskConfig
from unclipped.evaluation.figures import Difference, Figure, is_figure
from unclipped.evaluation.intervals import estimate, paired_difference
from unclipped.evaluation.predictions import Prediction
from unclipped.evaluation.scorers import Score, Scorer, build_scorer

UNCATEGORISED = "all"
"""Category of items that have none."""


@dataclass(frozen=True)
class Breakdown:
    """A figure over some items, and over each category of them (categories in order of their names)."""

    overall: Figure
    categories: dict[str, Figure]

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "overall": self.overall.to_dict(),
            "categories": {name: row.to_dict() for name, row in self.categories.items()},
        }


@dataclass(frozen=True)
class TaskResult:
    """What one task gave: the headline figure, its parts, and how many answers could not be read."""

    task: str
    scorer: str
    images: str
    overall: Figure
    categories: dict[str, Figure]
    groups: dict[str, Breakdown] = field(default_factory=dict)
    extra: dict[str, Breakdown] = field(default_factory=dict)
    num_unparsed: int = 0
    num_unanswered: int = 0
    """Items that the model was not asked, because their prompts are too long for it; they count as wrong."""
    num_with_thinking: int = 0
    """Answers from which thinking was taken out before they were scored."""
    seconds: float | None = None

    @property
    def unparsed_share(self) -> float:
        """Share of the answers that could not be read; they count as wrong."""
        return self.num_unparsed / self.overall.count

    @property
    def metric(self) -> str:
        """Name of the figure."""
        return self.overall.metric.name

    @property
    def higher_is_better(self) -> bool:
        """Direction of the figure."""
        return self.overall.metric.higher_is_better

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "task": self.task,
            "scorer": self.scorer,
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "images": self.images,
            **Breakdown(self.overall, self.categories).to_dict(),
            "groups": {name: part.to_dict() for name, part in self.groups.items()},
            "extra": {name: part.to_dict() for name, part in self.extra.items()},
            "num_unparsed": self.num_unparsed,
            "unparsed_share": self.unparsed_share,
            "num_unanswered": self.num_unanswered,
            "num_with_thinking": self.num_with_thinking,
            "seconds": self.seconds,
        }


def score_prediction(scorer: Scorer, prediction: Prediction, task: str) -> Score:
    """Score one prediction. Raises DataError that names task and item when its gold cannot be scored."""
    try:
        return scorer.score(prediction.prediction, prediction.answers, prediction.choices)
    except DataError as error:
        raise DataError(f"task {task}, item {prediction.id}: {error}") from None


def _estimate(scorer: Scorer, pairs: Sequence[tuple[Prediction, Score]], config: EvaluationConfig) -> Figure:
    return estimate(
        [score.numerator for _, score in pairs],
        [score.denominator for _, score in pairs],
        [prediction.cluster_key for prediction, _ in pairs],
        is_binary=scorer.is_binary,
        interval=config.interval if scorer.is_binary else "bootstrap",
        samples=config.bootstrap_samples,
        confidence=config.confidence,
        seed=config.seed,
        metric=scorer.metric,
    )


def _split(
    items: Iterable[tuple[Prediction, Any]], key: Callable[[Prediction], str]
) -> dict[str, list[tuple[Prediction, Any]]]:
    parts: dict[str, list[tuple[Prediction, Any]]] = {}
    for item in items:
        parts.setdefault(key(item[0]), []).append(item)
    return dict(sorted(parts.items()))


def _category(prediction: Prediction) -> str:
    return prediction.category or UNCATEGORISED


def _breakdown(scorer: Scorer, pairs: Sequence[tuple[Prediction, Score]], config: EvaluationConfig) -> Breakdown:
    return Breakdown(
        _estimate(scorer, pairs, config),
        {name: _estimate(scorer, part, config) for name, part in _split(pairs, _category).items()},
    )


def summarise(
    predictions: Sequence[Prediction],
    task: TaskConfig,
    config: EvaluationConfig,
    *,
    images: str = "kept",
    seconds: float | None = None,
) -> TaskResult:
    """Score predictions and compute every figure of a task. Raises DataError when there are none."""
    if not predictions:
        raise DataError(f"task {task.name}: no predictions to score")
    scorer = build_scorer(task.scorer, task.scorer_options)
    pairs = [(prediction, score_prediction(scorer, prediction, task.name)) for prediction in predictions]
    whole = _breakdown(scorer, pairs, config)
    groups: dict[str, Breakdown] = {}
    for inside, outside, flag in (
        ("held_out", "not_held_out", lambda prediction: prediction.held_out),
        ("unseen_answers", "seen_answers", lambda prediction: prediction.answer_unseen),
    ):
        known = [pair for pair in pairs if flag(pair[0]) is not None]
        parts = _split(known, lambda prediction, flag=flag, names=(outside, inside): names[bool(flag(prediction))])
        groups |= {name: _breakdown(scorer, part, config) for name, part in parts.items()}
    extra = {}
    for name, options in task.extra_scorers.items():
        other = build_scorer(name, options)
        scored = [(prediction, score_prediction(other, prediction, task.name)) for prediction in predictions]
        extra[name] = _breakdown(other, scored, config)
    return TaskResult(
        task=task.name,
        scorer=task.scorer,
        images=images,
        overall=whole.overall,
        categories=whole.categories,
        groups=groups,
        extra=extra,
        num_unparsed=sum(not score.is_parsed for _, score in pairs),
        num_unanswered=sum(prediction.unanswered is not None for prediction in predictions),
        num_with_thinking=sum(score.has_thinking for _, score in pairs),
        seconds=seconds,
    )


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """The results.json of an evaluation: {"model" | "blind": {task: result}, …}.

    Raises DataError unless every figure has its value, interval and count.
    """
    remedy = "score again with unclipped eval --rescore"
    found = read_json(path, remedy=remedy)
    for arm in ("model", "blind"):
        tasks = found.get(arm, None if arm == "model" else {})
        if not isinstance(tasks, dict) or not all(is_task_result(task) for task in tasks.values()):
            raise DataError(f"{path}: not the results of an evaluation ('{arm}'); {remedy}")
    return found


def is_task_result(value: Any) -> bool:
    """Whether a value has the form of `TaskResult.to_dict`."""
    if not isinstance(value, dict) or not isinstance(metric := value.get("metric"), str):
        return False
    groups = value.get("groups")
    return isinstance(groups, dict) and all(_is_breakdown(part, metric) for part in (value, *groups.values()))


def _is_breakdown(value: Any, metric: str) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("categories"), dict):
        return False
    return all(is_figure(row, metric) for row in (value.get("overall"), *value["categories"].values()))


@dataclass(frozen=True)
class Comparison:
    """Paired differences between two prediction sets: over all items, and over each category."""

    overall: Difference
    categories: dict[str, Difference]

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "overall": self.overall.to_dict(),
            "categories": {name: row.to_dict() for name, row in self.categories.items()},
        }


def compare(
    first: Sequence[Prediction], second: Sequence[Prediction], task: TaskConfig, config: EvaluationConfig
) -> Comparison:
    """First minus second figure on the same items.

    Raises DataError when the two prediction sets are not about the same items in the same order.
    """
    if [item.key for item in first] != [item.key for item in second]:
        raise DataError(f"task {task.name}: the two prediction sets are not about the same items; evaluate both anew")
    scorer = build_scorer(task.scorer, task.scorer_options)
    pairs = [
        (one, (score_prediction(scorer, one, task.name), score_prediction(scorer, two, task.name)))
        for one, two in zip(first, second, strict=True)
    ]

    def difference(part: Sequence[tuple[Prediction, tuple[Score, Score]]]) -> Difference:
        return paired_difference(
            [scores[0].numerator for _, scores in part],
            [scores[1].numerator for _, scores in part],
            [scores[0].denominator for _, scores in part],
            [prediction.cluster_key for prediction, _ in part],
            second_weights=[scores[1].denominator for _, scores in part],
            samples=config.bootstrap_samples,
            confidence=config.confidence,
            seed=config.seed,
            metric=scorer.metric,
        )

    return Comparison(difference(pairs), {name: difference(part) for name, part in _split(pairs, _category).items()})
