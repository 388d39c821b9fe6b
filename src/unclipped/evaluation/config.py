"""What to evaluate, as data: tasks (questions, prompt, scorer) and how their intervals are computed. No torch here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from unclipped.attention.config import SparseConfig
from unclipped.core.config import BatchSize, FrozenConfig, Name, OpenShare, Options, Resamples, Seed, Tokens, Whole
from unclipped.data.config import SourceConfig


class TaskConfig(FrozenConfig):
    """One set of questions, how they are put to the model, and the rule that scores the answers."""

    name: str = Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$")
    """Name of the task: the key in results and the name of its folder (letters, digits, `_ . + -`)."""
    source: SourceConfig
    """Where the questions come from. `cluster` (see the source) names the questions of one scene or document,
    which intervals draw together; without it, questions about one image file are drawn together."""
    scorer: Name = "exact_match"
    """Rule of the headline figure: exact_match, relaxed_accuracy, anls, character_error_rate, vqa_soft,
    multiple_choice, within_percent."""
    scorer_options: Options = Field(default_factory=dict)
    """Options of that rule, for example `{case_sensitive: true}`; an unknown option is refused."""
    extra_scorers: Annotated[dict[str, Options], Field(max_length=100)] = Field(default_factory=dict)
    """Further rules reported beside the headline, by name, each with its options."""
    prompt_prefix: str = ""
    """Text put before the first text of the question."""
    prompt_suffix: str = ""
    """Text put after the question, for example ` Answer with one word or phrase.`"""
    max_new_tokens: Tokens = 32
    """Longest answer, in tokens."""
    limit: Annotated[Whole, Field(ge=1, le=10**9)] | None = None
    """Number of questions to ask: the first ones of the source. None: all (required for an endless source)."""
    unseen_answers_of: SourceConfig | None = None
    """A training source. Items whose answer occurs nowhere among its answers are reported apart as `unseen_answers`."""

    @model_validator(mode="after")
    def _known_scorers(self) -> TaskConfig:
        from unclipped.core.errors import UsageError
        from unclipped.evaluation.scorers import build_scorer

        for name, options in ((self.scorer, self.scorer_options), *self.extra_scorers.items()):
            try:
                build_scorer(name, options)
            except UsageError as error:
                raise ValueError(str(error)) from None
        if self.scorer in self.extra_scorers:
            raise ValueError(f"scorer '{self.scorer}' stands again under extra_scorers; name it once")
        return self


class EvaluationConfig(FrozenConfig):
    """The `evaluation:` section of a recipe."""

    tasks: Annotated[tuple[TaskConfig, ...], Field(max_length=1000)] = ()
    """What is measured, in this order."""
    batch_size: BatchSize = 64
    """Questions generated together."""
    blind: bool = False
    """Also ask every question with its images removed, and report the paired difference."""
    images: Literal["kept", "removed", "blank"] = "kept"
    """What the model sees of each image: the image, nothing, or an image of the mean colour in its place (for arms
    trained that way)."""
    interval: Literal["auto", "bootstrap", "wilson"] = "auto"
    """`bootstrap`: percentile bootstrap over clusters. `wilson`: for right-or-wrong scores (others keep the
    bootstrap). `auto`: bootstrap, but Wilson where it degenerates (right-or-wrong scores that are all equal, or fewer
    than 30 clusters)."""
    sparse: SparseConfig | None = None
    """Prefill under this pattern; null: dense."""
    bootstrap_samples: Resamples = 2000
    """Number of bootstrap resamples."""
    confidence: OpenShare = 0.95
    """Coverage of the intervals."""
    seed: Seed = 0
    """Seed of the bootstrap."""

    @field_validator("tasks")
    @classmethod
    def _distinct_names(cls, tasks: tuple[TaskConfig, ...]) -> tuple[TaskConfig, ...]:
        names = [task.name for task in tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two tasks share the name '{twice[0]}'; every task needs its own")
        return tasks

    @model_validator(mode="after")
    def _one_blind_arm(self) -> EvaluationConfig:
        if self.blind and self.images == "removed":
            raise ValueError("blind: the images are removed already (images: removed); set blind: false")
        return self
