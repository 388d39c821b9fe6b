"""Raw predictions on disk: one JSON line an item, appended as they come, resumed only by the run that began them."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import ConfigDict, ValidationError, create_model

from unclipped.core.documents import read_json, read_jsonl
from unclipped.core.errors import DataError, UsageError
from unclipped.core.files import append_jsonl, cut_unfinished_line, write_json

PREDICTIONS_FILE = "predictions.jsonl"
TASK_FILE = "task.json"


@dataclass(frozen=True)
class Prediction:
    """One item with the model's raw answer and all that scoring needs, so that scores can be computed anew."""

    index: int
    id: str
    question: str
    answers: tuple[str, ...]
    prediction: str
    choices: tuple[str, ...] = ()
    category: str | None = None
    cluster: str | None = None
    held_out: bool | None = None
    answer_unseen: bool | None = None
    score: float | None = None
    unanswered: str | None = None
    """Why the model was not asked, as when the prompt is longer than its positions; the prediction is empty then."""

    @property
    def key(self) -> tuple[int, str]:
        """What makes two predictions be about the same item: its place in the source and its id."""
        return self.index, self.id

    @property
    def cluster_key(self) -> tuple[str, Any]:
        """Label of the items drawn together with this one; an item without a cluster stands alone."""
        return ("item", self.index) if self.cluster is None else ("cluster", self.cluster)


_FIELDS: dict[str, Any] = {
    name: (kind, getattr(Prediction, name, ...)) for name, kind in get_type_hints(Prediction).items()
}
_ROW = create_model("prediction", __config__=ConfigDict(strict=True, extra="forbid"), **_FIELDS)


def fingerprint(parts: Any) -> str:
    """A short digest of a JSON-able value; equal values have equal digests whatever the order of their keys."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class PredictionFile:
    """The predictions of one task in one folder, beside the settings that they were made with."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / PREDICTIONS_FILE
        self.task_path = self.folder / TASK_FILE

    def begin(self, settings: dict[str, Any], identity: str, *, resume: bool) -> list[Prediction]:
        """Write the settings, or check them on resume; -> the predictions that are there already.

        settings: what `rescore` reads back. identity: digest of model, questions and prompt. Raises UsageError when the
        folder holds predictions and `resume` is false, or when they came from another model or other settings.
        """
        existing = self.path.exists() and self.path.stat().st_size > 0
        if existing and not resume:
            raise UsageError(f"{self.path}: predictions are there already; choose another --output or add --resume")
        if existing:
            found = self.settings().get("identity")
            if found != identity:
                raise UsageError(
                    f"{self.path}: made by another model or other task settings (identity {found}, expected "
                    f"{identity}); choose another --output or remove this folder"
                )
            cut_unfinished_line(self.path)  # an interrupted write, whose item is asked again
        write_json(self.task_path, {"identity": identity, **settings})
        return self.read() if existing else []

    def settings(self) -> dict[str, Any]:
        """What `begin` wrote. Raises DataError when the file is missing or damaged."""
        if not self.task_path.is_file():
            raise DataError(f"{self.task_path}: no such file; {self.folder} is not the folder of an evaluated task")
        return read_json(self.task_path, remedy="evaluate again in another folder")

    def append(self, predictions: Iterable[Prediction]) -> None:
        """Add predictions at the end of the file."""
        append_jsonl(self.path, (asdict(prediction) for prediction in predictions))

    def read(self) -> list[Prediction]:
        """All predictions, in the order of their index. Raises DataError naming the line that cannot be read."""
        rows = []
        for number, row in read_jsonl(self.path):
            for name in ("answers", "choices"):
                if isinstance(row.get(name), list):
                    row[name] = tuple(row[name])
            try:
                _ROW.model_validate(row)
            except ValidationError as error:
                first = error.errors()[0]
                reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
                raise DataError(f"{self.path}, line {number}: not a prediction ({reason}); evaluate again") from None
            rows.append(Prediction(**row))
        rows.sort(key=lambda prediction: prediction.index)
        doubled = [one.id for one, two in itertools.pairwise(rows) if one.index == two.index]
        if doubled:
            raise DataError(f"{self.path}: item {doubled[0]} stands twice; remove the folder and evaluate again")
        return rows
