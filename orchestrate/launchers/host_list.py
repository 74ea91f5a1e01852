"""Names of nodes as Slurm shortens them: `gpu[07-09,12],login1`."""

import re

_BRACKETS = re.compile(r"\[([^\]]*)\]")


def expand_hosts(text: str) -> tuple[str, ...]:
    """Return every name of a host list, in its order; zeros in front of numbers stay."""
    return tuple(name for part in _split(text) for name in _expand(part))


def _split(text: str) -> list[str]:
    """Split at the commas outside brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += {"[": 1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _expand(name: str) -> list[str]:
    found = _BRACKETS.search(name)
    if found is None:
        return [name]
    before, after = name[: found.start()], _expand(name[found.end() :])
    return [f"{before}{number}{end}" for number in expand_numbers(found[1]) for end in after]


def expand_numbers(text: str) -> list[str]:
    """Return every number of a list such as `0-3,07`, as text."""
    numbers: list[str] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if dash and first.isdigit() and last.isdigit():
            numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
        elif part:
            numbers.append(part)
    return numbers
