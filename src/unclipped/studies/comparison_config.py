"""Configuration of a comparison of pretraining objectives on equal terms. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator

from unclipped.audit.config import EncoderEvaluationConfig
from unclipped.core.config import FrozenConfig, Options, PathText, Processes, Seed, merge
from unclipped.core.errors import UsageError
from unclipped.studies.config import ExperimentConfig
from unclipped.training.config import PretrainConfig

RANDOM, LLM_INIT, BLIND = "random_encoder", "llm_init", "blind"
FROM_ARM = "arm:"
ALIKE = ("data", "steps", "batch_size", "gradient_accumulation", "image_size", "phases")
"""Fields in which no arm may differ: the same images, and equally many of them."""
_PENDING = "pending"


class ComparisonConfig(FrozenConfig):
    """Encoders pretrained by several objectives, each probed, then joined to the same language model."""

    description: str = ""
    """What the comparison is for, in one sentence; stands at the head of the report."""
    pretrain: Options
    """Fields of the pretraining that all arms share, those of `unclipped pretrain`."""
    arms: Annotated[dict[str, Options], Field(max_length=1000)]
    """For each arm its objective and the fields that are its own. No arm may change data, steps, batch_size,
    gradient_accumulation, image_size or phases. `distill.teacher: arm:NAME` takes another arm's encoder."""
    probes: Annotated[dict[str, Options], Field(max_length=1000)] = Field(default_factory=dict)
    """For each probe the fields of `unclipped eval-encoder`, without the encoder."""
    vlm: Options | None = None
    """Fields of `unclipped train` that all arms share, without `model.vision`; null: encoders are only probed."""
    llm_init: PathText | None = None
    """A language model whose untrained turn into an encoder is one more arm of the trained models; null: left out."""
    seeds: Annotated[tuple[Seed, ...], Field(max_length=1000)] = ()
    """Seeds of weights, order and augmentation: the whole comparison is run with each, in `seed-N/`, and summed up on
    one page. Empty: once, with the seeds that stand under `training`."""
    arms_at_once: Processes = 1
    """Arms trained side by side, each in a process with its share of the cores."""

    @field_validator("seeds")
    @classmethod
    def _different(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"the same seed twice in {list(value)}; name each once")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> ComparisonConfig:
        if not self.arms:
            raise ValueError("arms: give at least one arm with its objective")
        for name, fields in self.arms.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) or name in (RANDOM, LLM_INIT, BLIND):
                raise ValueError(f"arms.{name}: expected letters, digits, _ . -, and no name of a baseline")
            if changed := [field for field in ALIKE if field in fields]:
                raise ValueError(f"arms.{name}.{changed[0]}: all arms are alike in it; set pretrain.{changed[0]}")
            teacher = self.teacher_of(name)
            if teacher is not None and (teacher not in self.arms or self.teacher_of(teacher) is not None):
                raise ValueError(f"arms.{name}.distill.teacher: no arm '{teacher}' without a teacher of its own")
            _checked(f"arms.{name}", self.pretraining, name, Path(_PENDING))
        for name in self.probes:
            _checked(f"probes.{name}", self.probe, name, _PENDING, is_baseline=False)
        if self.vlm is not None:
            _checked("vlm", self.experiment, _PENDING, is_baseline=False)
        elif self.llm_init is not None:
            raise ValueError("llm_init: is an arm of the trained models; give vlm, too")
        return self

    def with_seed(self, seed: int) -> ComparisonConfig:
        """The comparison run once, all trainings and the random weights beside the probes drawn by `seed`."""
        training: dict[str, Any] = {"training": {"seed": seed}}
        return type(self)(
            **self.model_dump()
            | {
                "seeds": (),
                "pretrain": merge(self.pretrain, training),
                "probes": {name: merge(fields, {"random_seed": seed}) for name, fields in self.probes.items()},
                "vlm": None if self.vlm is None else merge(self.vlm, training),
            }
        )

    def teacher_of(self, name: str) -> str | None:
        """The arm that is an arm's teacher."""
        distill = self.arms[name].get("distill")
        teacher = distill.get("teacher") if isinstance(distill, dict) else None
        return teacher.removeprefix(FROM_ARM) if isinstance(teacher, str) and teacher.startswith(FROM_ARM) else None

    def waves(self) -> list[list[str]]:
        """Arms in the order in which they can be trained: those with a teacher arm after the others."""
        free = [name for name in self.arms if self.teacher_of(name) is None]
        bound = [name for name in self.arms if self.teacher_of(name) is not None]
        return [free, bound] if bound else [free]

    def pretraining(self, name: str, encoders: Path) -> PretrainConfig:
        """The pretraining of an arm; `encoders` holds the folders of finished arms."""
        fields = merge(self.pretrain, self.arms[name])
        if (teacher := self.teacher_of(name)) is not None:
            fields = merge(fields, {"distill": {"teacher": str(encoders / teacher / "model")}})
        return PretrainConfig(**fields)

    def probe(self, name: str, encoder: str, *, is_baseline: bool) -> EncoderEvaluationConfig:
        """A probe of an encoder folder."""
        return EncoderEvaluationConfig(**(self.probes[name] | {"encoder": encoder, "baseline": is_baseline}))

    def experiment(self, encoder: str, *, is_baseline: bool) -> ExperimentConfig:
        """The training of a model with an encoder folder."""
        assert self.vlm is not None
        return ExperimentConfig(**merge(self.vlm, {"model": {"vision": encoder, "baseline": is_baseline}}))


def _checked(what: str, make: Any, *arguments: Any, **named: Any) -> None:
    """Call `make`; its complaints as one ValueError about `what`."""
    try:
        make(*arguments, **named)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join([what, *(str(part) for part in first["loc"])])
        message = str(first["msg"]).removeprefix("Value error, ")
        found = first["input"]
        shown = f" (found {found!r:.80})" if isinstance(found, str | int | float | None) else ""
        raise ValueError(f"{place}: {message}{shown}") from None
    except (UsageError, TypeError) as error:
        raise ValueError(f"{what}: {error}") from None
