"""Settings of methods and detectors that differ by family of models, and a method's settings from mild to strong."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_bench.config.schema import is_within
from nemo_bench.errors import ConfigError, did_you_mean
from nemo_bench.records.schema import Strength

FAMILIES = "families"
"""Key of the settings by family in a file of the groups method and detector."""
STRENGTHS = "strengths"
"""Key, in a file of the group method, of one setting and its values from mild to strong; null where there are none."""


@dataclass(frozen=True)
class FamilySettings:
    """Settings of a method or detector that were chosen for the family of a model."""

    node: str  #: Key of the method or detector: ``method``, ``method.source``, ``detector``.
    family: str | None  #: Family of the model, see :attr:`nemo_bench.config.ModelSettings.family`.
    known: bool  #: Whether the file of the method has settings for this family.
    #: Chosen settings; of an unknown family the file's defaults of all settings that differ by family.
    values: Mapping[str, Any]
    given: Mapping[str, Any]  #: Settings that the user gave instead.
    #: The strength at which a method is run, of several, where it is not the chosen setting.
    strength: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        source, values = f"for {self.family}", _listed(self.values)
        if not self.known:
            source = f"none published for {self.family or 'a model without model.family'}, so the defaults"
        elif not values:
            values = "the defaults"
        chosen = f"{source}: {values}" if values else source
        given = f"; as given: {_listed(self.given)}" if self.given else ""
        strength = f"; strength: {_listed(self.strength)}" if self.strength else ""
        inner = self.node.partition(".")[2]
        return f"{inner} {chosen}{given}{strength}".strip()


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def settle(node: dict[str, Any], key: str, family: str | None, given: Collection[str]) -> list[FamilySettings]:
    """Sets the settings of a model's family in a node and in nodes inside it, except for keys that the user gave.

    Removes :data:`FAMILIES` from them, and returns the chosen settings of each node that had it.
    """
    by_family = node.pop(FAMILIES, None)
    found = []
    if by_family is not None:
        names = _names(by_family, node, f"{key}.{FAMILIES}")
        kept = {name: node[name] for name in names if any(is_within(other, [f"{key}.{name}"]) for other in given)}
        chosen = by_family.get(family)
        values = {name: node[name] for name in names} if chosen is None else chosen
        values = {name: value for name, value in values.items() if name not in kept}
        node.update(values)
        shown = [{name: own[name] for name in own if name != STRENGTHS} for own in (values, kept)]
        found.append(FamilySettings(key, family, chosen is not None, *shown))
    for name, value in node.items():
        if isinstance(value, dict) and "_target_" in value:
            found += settle(value, f"{key}.{name}", family, given)
    return found


def take_strength(node: dict[str, Any], key: str) -> Strength | None:
    """Removes :data:`STRENGTHS` from a node and from nodes inside it, and returns that of the node itself, checked."""
    given = node.pop(STRENGTHS, None)
    for name, value in node.items():
        if isinstance(value, dict) and "_target_" in value:
            take_strength(value, f"{key}.{name}")
    if given is None:
        return None
    values = next(iter(given.values())) if isinstance(given, Mapping) and len(given) == 1 else None
    if not isinstance(values, list) or len(values) < 2 or any(value in values[:i] for i, value in enumerate(values)):
        expected = "a setting and several values from mild to strong, such as {scale: [1, 2, 4]}, or null"
        raise ConfigError(f"{key}.{STRENGTHS}: expected {expected}; given {given}")
    (setting,) = given
    if setting not in node:
        raise ConfigError(f"{key}.{STRENGTHS}: there is no setting '{setting}'. {did_you_mean(str(setting), node)}")
    return Strength(setting=setting, values=values)


def _names(by_family: Any, node: Mapping[str, Any], key: str) -> list[str]:
    """The settings that differ by family, checked."""
    if not isinstance(by_family, Mapping) or not all(isinstance(own, Mapping) for own in by_family.values()):
        raise ConfigError(f"{key}: expected settings by family, such as sd2: {{rate: 0.1}}, given {by_family}")
    names = list(dict.fromkeys(name for own in by_family.values() for name in own))
    for name in names:
        if name not in node:
            raise ConfigError(f"{key}: there is no setting '{name}' beside it. {did_you_mean(name, map(str, node))}")
    return names
