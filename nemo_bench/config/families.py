"""Settings of methods and detectors that differ by family of models."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_bench.errors import ConfigError, did_you_mean

FAMILIES = "families"
"""Key of the settings by family in a file of the groups method and detector."""


@dataclass(frozen=True)
class FamilySettings:
    """Which settings were chosen for the family of a model.

    Attributes:
        node: The method or detector: ``method``, ``method.source``, ``detector``.
        family: Family of the model, see :attr:`nemo_bench.config.ModelSettings.family`.
        known: Whether the file of the method has settings for this family.
        values: What they are; of an unknown family all that differ by family, with the file's defaults.
        given: Those that the user gave, and so were not chosen.
    """

    node: str
    family: str | None
    known: bool
    values: Mapping[str, Any]
    given: Mapping[str, Any]

    def __str__(self) -> str:
        values, given = (
            ", ".join(f"{name}={value}" for name, value in each.items()) for each in (self.values, self.given)
        )
        values = "; as given: ".join(part for part in (values or "the defaults", given) if part)
        inner = self.node.partition(".")[2]
        if self.known:
            text = f"for {self.family}: {values}"
        else:
            text = f"none published for {self.family or 'a model without model.family'}, so the defaults: {values}"
        return f"{inner} {text}".strip()


def settle(node: dict[str, Any], key: str, family: str | None, given: Collection[str]) -> list[FamilySettings]:
    """Puts the settings of a family where the user gave none, in a node and those inside of it.

    Args:
        node: ``_target_`` and arguments; :data:`FAMILIES` is taken out of it.
        key: Where the node is.
        family: Family of the model, None for an unknown one.
        given: Keys that the user set; they stay as they are.

    Returns:
        What was chosen, for each node that has settings by family.

    Raises:
        ConfigError: Settings by family are no mappings, or name what the node does not have.
    """
    by_family = node.pop(FAMILIES, None)
    found = []
    if by_family is not None:
        names = _names(by_family, node, f"{key}.{FAMILIES}")
        chosen = by_family.get(family)
        kept = {name: node[name] for name in names if any(f"{own}.".startswith(f"{key}.{name}.") for own in given)}
        values = {name: node[name] for name in names} if chosen is None else chosen
        values = {name: value for name, value in values.items() if name not in kept}
        node.update(values)
        found.append(FamilySettings(key, family, chosen is not None, values, kept))
    for name, value in node.items():
        if isinstance(value, dict) and "_target_" in value:
            found += settle(value, f"{key}.{name}", family, given)
    return found


def _names(by_family: Any, node: Mapping[str, Any], key: str) -> list[str]:
    """The settings that differ by family, checked."""
    if not isinstance(by_family, Mapping) or not all(isinstance(own, Mapping) for own in by_family.values()):
        raise ConfigError(f"{key}: expected settings by family, such as sd2: {{rate: 0.1}}, given {by_family}")
    names = list(dict.fromkeys(name for own in by_family.values() for name in own))
    for name in names:
        if name not in node:
            raise ConfigError(f"{key}: there is no setting '{name}' beside it. {did_you_mean(name, map(str, node))}")
    return names
