"""Writes out what follows from the policies' dataclasses: `python -m kvarena.stack.generate`.

Sections of `.env.example` and `compose.yaml` stand between two comments that name them, and are replaced; what is
around them is written by hand. A fast test checks that they are current.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kvarena.policies.params import OPTIONS, PARAMETERS, POLICY, REGISTRY
from kvarena.policies.registry import summary_of
from kvarena.stack.home import project_root
from kvarena.stack.settings import BLEND_PREFIX

LINE_LENGTH = 120
COMMAND = "python -m kvarena.stack.generate"
Lines = Iterator[str]


@dataclass(frozen=True)
class Section:
    """The lines of a file between `# >>> NAME` and `# <<< NAME`; they are indented as these are."""

    path: str
    name: str
    lines: Callable[[], Lines]

    def in_text(self, text: str) -> str:
        """The file's text with this section anew. Raises `ValueError` where its comments are missing."""
        lines = text.splitlines()
        begin = next((at for at, line in enumerate(lines) if line.strip().startswith(f"# >>> {self.name}:")), None)
        end = next((at for at, line in enumerate(lines) if line.strip() == f"# <<< {self.name}"), None)
        if begin is None or end is None or end < begin:
            raise ValueError(f"{self.path} has no section between '# >>> {self.name}: ...' and '# <<< {self.name}'")
        indent = lines[begin][: lines[begin].index("#")]
        new = [f"# >>> {self.name}: written by {COMMAND}", *self.lines(), f"# <<< {self.name}"]
        lines[begin : end + 1] = [f"{indent}{line}" if line else "" for line in new]
        return "\n".join(lines) + "\n"


def comment(text: str) -> Lines:
    return (f"# {line}" for line in textwrap.wrap(text, LINE_LENGTH - 2, break_on_hyphens=False))


# --- Policies ---


def env_policies() -> Lines:
    """Each parameter with the policies that have it, unless those are all that have any."""
    with_parameters = [name for name, own in OPTIONS.items() if own]
    for name, own in PARAMETERS.items():
        having = [policy for policy in with_parameters if name in OPTIONS[policy]]
        if own is POLICY:
            yield from comment(f"{own.help} One of:")
            yield from (f"#   {policy}: {summary_of(cls)}" for policy, cls in REGISTRY.items())
        else:
            whose = "" if having == with_parameters else f"{', '.join(having)}: "
            yield from comment(whose + own.help_with_values)
        yield f"#{BLEND_PREFIX.upper()}{name.upper()}={own.default}"


def compose_policies() -> Lines:
    return (f"{BLEND_PREFIX.upper()}{name.upper()}:" for name in PARAMETERS)


SECTIONS = (
    Section(".env.example", "policies", env_policies),
    Section("compose.yaml", "policies", compose_policies),
)


def generated(root: Path) -> dict[Path, str]:
    """What each file with sections shall hold."""
    texts: dict[Path, str] = {}
    for section in SECTIONS:
        path = root / section.path
        texts[path] = section.in_text(texts[path] if path in texts else path.read_text())
    return texts


def main() -> None:
    """Writes the files that aren't current, and names them."""
    for path, text in generated(project_root()).items():
        if path.read_text() != text:
            path.write_text(text)
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
