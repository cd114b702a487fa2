"""What a configuration's value may be, declared beside it: range, choices, whether a resumed run may change it, help.

@dataclass(frozen=True)
class ModelConfig:
    width: int = setting(256, 1, 8192, help="of the memory")
    lr: float = setting(1e-3, above=0, high=1, resumable=True, help="learning rate")
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import Field, field, fields, is_dataclass
from typing import Any, NamedTuple

from envs.errors import UserError, nearest

FLOAT32 = 3.4e38  # the largest number in single precision, about
LARGEST = 10**12  # of a whole number without a bound of its own: what is larger overflows somewhere


class Setting(NamedTuple):
    """What is declared of one value; None bounds nothing."""

    low: float | None = None
    high: float | None = None
    above: float | None = None  # the value itself is out of range
    choices: tuple[str, ...] = ()
    resumable: bool = False  # a run that goes on may change it
    required: bool = False  # a command does not begin without it
    when: tuple[tuple[str, tuple[Any, ...]], ...] = ()  # fields beside it and the values with which it is read at all
    help: str = ""

    @property
    def limits(self) -> str:
        """ "at least 1", "between 0 and 1", "above 0", "one of a, b", or "" where nothing is declared."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.above is not None:
            most = f" and at most {_shown(self.high)}" if self.high is not None else ""
            return f"above {_shown(self.above)}{most}"
        if self.low is not None and self.high is not None:
            return f"between {_shown(self.low)} and {_shown(self.high)}"
        return f"at least {_shown(self.low)}" if self.low is not None else ""

    @property
    def full_help(self) -> str:
        """The help, and with what the value is read: "frames that they see (with dynamics=block or frames)"."""
        return f"{self.help} (with {self.condition()})" if self.when else self.help

    def condition(self, prefix: str = "") -> str:
        """ "dynamics=block or frames and recurrent=true", each key with its prefix; "" where it is always read."""
        wanted = (" or ".join(_word(value) for value in values) for _, values in self.when)
        return " and ".join(f"{prefix}{name}={values}" for (name, _), values in zip(self.when, wanted, strict=True))


def setting(
    default: Any, low: float | None = None, high: float | None = None, *, above: float | None = None,
    choices: tuple[str, ...] = (), resumable: bool = False, required: bool = False,
    when: Mapping[str, Any] | None = None, help: str = "",
) -> Any:  # fmt: skip
    """A dataclass field with its range (ends included, but `above`), its choices and a line of help.

    `when` names fields beside it with a value, or several, without which nothing reads this one.
    """
    wanted = tuple((name, value if isinstance(value, tuple) else (value,)) for name, value in (when or {}).items())
    declared = Setting(low, high, above, choices, resumable, required, wanted, help)
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata={"setting": declared})
    return field(default=default, metadata={"setting": declared})


def declared(of: Field[Any]) -> Setting:
    """What was declared of a field; nothing for one that was not made by `setting`."""
    found = of.metadata.get("setting", Setting())
    assert isinstance(found, Setting)
    return found


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Setting]]:
    """Every value of a dataclass, groups within it included: (dotted key, value, what is declared of it)."""
    for one in fields(config):
        value, key = getattr(config, one.name), prefix + one.name
        if is_dataclass(value):
            yield from walk(value, key + ".")
        else:
            yield key, value, declared(one)


def check(config: Any, prefix: str = "") -> None:
    """Raises UserError naming the first key whose value is not finite, out of its range or none of its choices."""
    for key, value, rule in walk(config, prefix):
        for one in value if isinstance(value, tuple) else (value,):
            _check(key, one, rule)


def unread(config: Any, key: str) -> str | None:
    """Why nothing reads the value of a dotted key in this configuration, as a sentence; None where it is read.

    A configuration with a method `unread(key)` says so itself of keys that no single other key decides on.
    """
    if hasattr(config, "unread") and (reason := config.unread(key)):
        return str(reason)
    *groups, last = key.split(".")
    for group in groups:
        config = getattr(config, group, None)
    rules = {one.name: declared(one) for one in fields(config)} if is_dataclass(config) else {}
    rule = rules.get(last, Setting())
    for name, wanted in rule.when:
        value = getattr(config, name)
        if value not in wanted:
            prefix = "".join(f"{group}." for group in groups)
            return (f"{key} changes nothing here: it is read with {rule.condition(prefix)}, "
                    f"and {prefix}{name} is {_word(value)}.")  # fmt: skip
    return None


def _check(key: str, value: Any, rule: Setting) -> None:
    if value is None or isinstance(value, bool):
        return
    if rule.choices and value not in rule.choices:
        hint = nearest(str(value), rule.choices)
        raise UserError(f'{key} must be one of {", ".join(rule.choices)}, not "{value}". {hint}'.strip())
    if isinstance(value, float) and math.isfinite(value) and abs(value) > FLOAT32:
        raise UserError(f"{key} must be at most {FLOAT32:g} in size, which is what torch computes with, not {value}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key} must be {rule.limits or 'a finite number'}, not {value}.")
    if not isinstance(value, int | float):
        return
    high = rule.high if rule.high is not None or isinstance(value, float) else LARGEST
    low = -LARGEST if rule.low is None and isinstance(value, int) else rule.low
    low_enough, high_enough = high is None or value <= high, low is None or value >= low
    if not (low_enough and high_enough) or (rule.above is not None and not value > rule.above):
        limits = rule.limits if rule.high is not None or low_enough else f"at most {LARGEST:,}"
        raise UserError(f"{key} must be {limits}, not {_number(value)}.")


def _word(value: Any) -> str:
    """As it is typed."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _number(value: float) -> str:
    return str(value) if isinstance(value, float) or abs(value) < 10**30 else "a number of so many digits"


def _shown(value: float | None) -> str:
    assert value is not None
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else f"{value:g}"
