r"""Wildcards in prompts: of the choices in `{a|b|c}` the seed of an image draws one. No torch.

| written          | means                                                                             |
|------------------|-----------------------------------------------------------------------------------|
| `{a|b|c}`        | one of them, each as likely; what is written twice is twice as likely             |
| `{a|}`           | a or nothing                                                                      |
| `{a {b|c}|d}`    | a choice may have wildcards in it                                                 |
| `\{` `\|` `\}`   | the character itself, which `prompt.parse` takes it for; it stays in what is drawn |

Choices are taken as they stand, spaces and all. Braces without a bar of their own are plain text, and so are a brace
without its partner and a bar outside of braces: prompts of other programs stay as they are. Weights, brackets and BREAK
are read in what is drawn. Drawn again, that is drawn as itself.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

PART = re.compile(r"\\[\\{}|]|[{}|]|[^\\{}|]+|\\")  # an escape, what makes wildcards, plain text, a lone backslash


@dataclass(frozen=True)
class Prompts:
    """What one image is drawn of and kept away from, and what that was drawn from where it had wildcards."""

    prompt: str
    negative: str = ""
    prompt_template: Template | None = None
    negative_template: Template | None = None

    def facts(self) -> dict[str, str]:
        """What a record says of them."""
        given = {"prompt_template": self.prompt_template, "negative_template": self.negative_template}
        templates = {name: template.text for name, template in given.items() if template is not None}
        return {"prompt": self.prompt, "negative": self.negative, **templates}

    @property
    def prompt_choices(self) -> str:
        """The prompt with every choice in it, not the drawn ones alone."""
        return self.prompt if self.prompt_template is None else self.prompt_template.choices

    @property
    def negative_choices(self) -> str:
        """The same of the negative prompt."""
        return self.negative if self.negative_template is None else self.negative_template.choices


@dataclass(frozen=True)
class Template:
    """A prompt taken apart in linear time, however its braces nest."""

    text: str
    parts: tuple[str, ...]
    starts: Mapping[int, tuple[int, ...]]  # by the part that opens a wildcard: those that its choices begin with
    ends: Mapping[int, int]  # by the part that ends a choice: the one behind its wildcard

    @property
    def has_wildcards(self) -> bool:
        """Whether there is anything to draw."""
        return bool(self.starts)

    @cached_property
    def choices(self) -> str:
        """All choices of all wildcards, with spaces between them: what is wrong in one is wrong in this."""
        if not self.starts:
            return self.text
        return "".join(" " if i in self.starts or i in self.ends else part for i, part in enumerate(self.parts))

    @cached_property
    def may_be_blank(self) -> bool:
        """Whether nothing but white space can be drawn."""
        is_blank = [True] * (len(self.parts) + 1)  # from each part to the end of what is drawn
        for i in range(len(self.parts) - 1, -1, -1):
            if i in self.starts:
                is_blank[i] = any(is_blank[start] for start in self.starts[i])
            elif i in self.ends:
                is_blank[i] = is_blank[self.ends[i]]
            else:
                is_blank[i] = is_blank[i + 1] and not self.parts[i].strip()
        return is_blank[0]

    def drawn(self, seed: int, name: str) -> str:
        """What a seed draws, each wildcard apart: by its number among all of the prompt, in the order of their braces.

        name: which of an image's prompts it is, so that equal ones are drawn apart, too.
        """
        if not self.starts:
            return self.text
        found, i = [], 0
        while i < len(self.parts):
            if i in self.starts:
                choices = self.starts[i]
                i = choices[draw(len(choices), seed, name, self._numbers[i])]
            elif i in self.ends:
                i = self.ends[i]
            else:
                found.append(self.parts[i])
                i += 1
        return "".join(found)

    @cached_property
    def _numbers(self) -> dict[int, int]:
        return {start: number for number, start in enumerate(sorted(self.starts))}


def template(text: str) -> Template:
    """A prompt taken apart; every string is one."""
    if "{" not in text:
        return Template(text, (text,), {}, {})
    parts = tuple(PART.findall(text))
    starts: dict[int, tuple[int, ...]] = {}
    ends: dict[int, int] = {}
    opened: list[tuple[int, list[int]]] = []  # braces without their partner so far, and the bars in each
    for i, part in enumerate(parts):
        if part == "{":
            opened.append((i, []))
        elif part == "|" and opened:
            opened[-1][1].append(i)
        elif part == "}" and opened:
            first, bars = opened.pop()
            if bars:
                starts[first] = (first + 1, *(bar + 1 for bar in bars))
                ends |= dict.fromkeys((*bars, i), i + 1)
    return Template(text, parts, starts, ends)


def draw(count: int, seed: int, name: str, number: int) -> int:
    """A number below `count` that depends on the rest alone, on every machine alike."""
    digest = hashlib.sha256(f"wildcard {name} {number} {seed}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % count


def prompts(prompt: Template, negative: Template, seed: int) -> Prompts:
    """What the image of a seed is drawn of."""
    return Prompts(
        prompt.drawn(seed, "prompt"),
        negative.drawn(seed, "negative"),
        prompt if prompt.has_wildcards else None,
        negative if negative.has_wildcards else None,
    )
