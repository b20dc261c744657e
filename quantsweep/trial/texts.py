"""Texts as parts of identities: what calibrated steps of a trial may look at, and what perplexities are measured on.

place       a file of this machine, or files of a data set on the hub at a pinned commit      label, never in an identity
content     the hash of the file, or the commit with the files' names                         in the identity
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from quantsweep.checks import whole_number
from quantsweep.errors import ConfigurationError
from quantsweep.trial.canonical import check_name, set_fields


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """Documents that calibration and perplexities are made of: a file of this machine, or files of a data set on the hub.

    path: .txt (one document), .jsonl, .json or .parquet, also .gz and .zst; may begin with ~, $NAME or package:; goes before hub_id.
    hub_id, files: a data set, and a pattern of its files' names; branch: where its commit is looked for (None: the default branch).
    column: of the documents, but for .txt.  revision: the commit that prewarm pinned.
    content: identity of the text ("sha256:…", "hub:<name>@<commit>/<files>"); None while it is not known.
    """

    hub_id: str | None = None
    files: str | None = None
    branch: str | None = None
    path: str | None = None
    column: str = "text"
    revision: str | None = None
    content: str | None = None

    @property
    def text_source(self) -> str:
        """Where the text comes from, for people."""
        return self.path or f"{self.hub_id}{f'@{self.revision[:12]}' if self.revision else ''}/{self.files}"


CalibrationRule = Literal["joined_crops", "document_crops", "concatenated"]
_CALIBRATION_ALWAYS = frozenset({"version", "rule", "column", "num_samples", "sequence_length", "seed"})
_CALIBRATION_NEVER = frozenset({"name", "hub_id", "files", "branch", "path", "revision", "content"})


@dataclass(frozen=True, kw_only=True)
class CalibrationSpec(TextSource):
    """Text that a calibrated step may look at; None where no step of a trial does.

    num_samples sequences of sequence_length tokens; rule: how they are cut out of the text (`quantsweep.calibration.data`);
    seed: which ones; version: raised by hand when the same words give other tokens.
    """

    name: str
    num_samples: int
    sequence_length: int
    rule: CalibrationRule = "joined_crops"
    seed: int = 0
    version: int = 1

    def __post_init__(self) -> None:
        check_name("calibration", self.name)
        if self.path is None and (self.hub_id is None or self.files is None):
            raise ConfigurationError(f"calibration {self.name}: give a text, calibration.path=FILE (.txt, .jsonl, .parquet; also .gz)")
        if self.rule not in get_args(CalibrationRule):
            raise ConfigurationError(f"calibration.rule {self.rule!r} is not one of {', '.join(get_args(CalibrationRule))}")
        whole_number("calibration.num_samples", self.num_samples)
        whole_number("calibration.sequence_length", self.sequence_length, 2)
        whole_number("calibration.seed", self.seed, 0)

    def problem_of_context(self, max_length: int) -> str | None:
        """Why its sequences cannot be read by a model with a context of `max_length` tokens; None if they can."""
        if self.sequence_length <= max_length:
            return None
        return (
            f"calibration {self.name}: sequences of {self.sequence_length:,} tokens were asked for, and the model's context has "
            f"{max_length:,}; give calibration.sequence_length={max_length}"
        )

    def identity(self) -> dict[str, Any]:
        """What of it decides which tokens come out; the content stands for the place, and the model's own for the tokenizer."""
        place = {"hub_id": self.hub_id, "files": self.files, "path": self.path}
        return set_fields(self, _CALIBRATION_ALWAYS, _CALIBRATION_NEVER) | {"content": self.content or place}


PERPLEXITY = "perplexity"
"""The kind of task that measures a text's perplexity in windows, as papers do."""
PerplexityProtocol = Literal["joined_paragraphs", "joined_spaces", "first_1100", "crops_256"]
"""How published perplexities make one stream of tokens of a text; see `quantsweep.evaluation.perplexity`."""
