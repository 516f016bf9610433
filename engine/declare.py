"""How a setting is declared: its type, default, rule and meaning, and what a value must be to be accepted."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass


def setting(
    default,
    meaning: str,
    *,
    unit: str = "",
    choices=None,
    at_least=None,
    above=None,
    at_most=None,
    below=None,
    only_if: Mapping[str, tuple] | None = None,
):
    """Declare one setting as a dataclass field.

    `only_if` names the settings, and their values, under which this one has an effect: setting it elsewhere
    is an error, because it would silently do nothing.
    """
    rule = dict(
        choices=tuple(choices) if choices else None,
        at_least=at_least,
        above=above,
        at_most=at_most,
        below=below,
    )
    meta = dict(meaning=meaning, unit=unit, rule=rule, only_if=dict(only_if or {}))
    return dataclasses.field(default=default, metadata=meta)


@dataclass(frozen=True)
class Setting:
    """One declaration, as the error messages and the generated defaults file need it."""

    name: str
    section: str
    type: type
    default: object
    meaning: str
    unit: str
    rule: Mapping
    only_if: Mapping[str, tuple]

    @property
    def allowed(self) -> str:
        """The values this setting takes, in words."""
        if self.rule["choices"]:
            return "one of " + ", ".join(self.rule["choices"])
        kind = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(
            self.type, "a list of whole numbers"
        )
        signs = {"at_least": "≥", "above": ">", "at_most": "≤", "below": "<"}
        limits = [f"{sign} {self.rule[key]}" for key, sign in signs.items() if self.rule[key] is not None]
        return " ".join([kind, " and ".join(limits)]).strip()

    def accepts(self, value) -> bool:
        """Whether `value` has the right type and keeps the rule."""
        if self.type is bool or self.type is str:
            right_type = isinstance(value, self.type)
        elif self.type is int:
            right_type = isinstance(value, int) and not isinstance(value, bool)
        elif self.type is float:
            right_type = (
                isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            )
        else:
            right_type = isinstance(value, list | tuple) and all(type(v) is int for v in value)
        if not right_type:
            return False
        rule = self.rule
        return not (
            (rule["choices"] is not None and value not in rule["choices"])
            or (rule["at_least"] is not None and value < rule["at_least"])
            or (rule["above"] is not None and value <= rule["above"])
            or (rule["at_most"] is not None and value > rule["at_most"])
            or (rule["below"] is not None and value >= rule["below"])
        )

    def typed(self, value):
        """An accepted `value` as the configuration holds it."""
        if self.type is float:
            return float(value)
        return tuple(value) if isinstance(value, list) else value
