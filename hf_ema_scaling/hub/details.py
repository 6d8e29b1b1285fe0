"""What a card says that no file of a run knows."""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|multilingual|code")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


@dataclass(frozen=True)
class CardDetails:
    """What only a person can say of a model or a data set; all of it is optional.

    Args:
        title: heading of the card; default: the name of the repository, or of the folder.
        language: ISO 639 codes such as `en`, or `multilingual`.
        license: identifier as the Hub spells it, such as `apache-2.0` or `cc-by-sa-3.0`.
        datasets: data sets on the Hub that it was made of.
        base_model: model on the Hub that training started from.
        tags: more tags.
        limits: what else a user must know, in plain text.

    Raises:
        ValueError: for a language, licence or name that the Hub would refuse.
    """

    title: str | None = None
    language: tuple[str, ...] = ()
    license: str | None = None
    datasets: tuple[str, ...] = ()
    base_model: str | None = None
    tags: tuple[str, ...] = ()
    limits: str | None = None

    def __post_init__(self) -> None:
        for code in self.language:
            if not _LANGUAGE.fullmatch(code):
                raise ValueError(f"language must be ISO 639 codes such as en or de, or multilingual; got {code!r}")
        if self.license is not None and not _LICENSE.fullmatch(self.license):
            raise ValueError(
                f"license must be an identifier of the Hub in lower case, such as apache-2.0, mit, cc-by-sa-3.0 or "
                f"other; got {self.license!r}"
            )
        for name in (*self.datasets, *([] if self.base_model is None else [self.base_model])):
            if not is_repo_id(name):
                raise ValueError(
                    f"{name!r} is no name on the Hub (OWNER/NAME): say in limits what else a model was made of"
                )


def is_repo_id(name: str) -> bool:
    """Whether the Hub could have a repository of this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def library_version() -> str:
    """Version of this library; empty where it is used from its source folder."""
    try:
        return importlib.metadata.version("hf-ema-scaling")
    except importlib.metadata.PackageNotFoundError:
        return ""
