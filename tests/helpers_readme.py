"""The commands, the Python code and the diffs in README.md and in the READMEs beside the code."""

import re
import shlex
from pathlib import Path

from tests.helpers import ROOT

FOLDERS = ("", "utils", "scripts", "dataset", "deeplab", "deeplab/weights", "tests")
READMES = {f"{folder}/README.md".lstrip("/"): (ROOT / folder / "README.md").read_text(encoding="utf-8") for folder in FOLDERS}
# Options in commands that work only after a change that the text describes; test_changes.py makes it and runs them.
AFTER_A_CHANGE = ("--backbone resnext50", "--net fcn", "--dataset streets")
TEXT = "\n\n".join(READMES.values())


def commands(text: str = TEXT) -> list[str]:
    """The commands of a text's bash blocks and of its inline code, with continued lines joined."""
    shell = "\n".join(blocks(text, "bash")).replace("\\\n", " ")
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in shell.splitlines()]
    inline = [" ".join(code.split()) for code in re.findall(r"(?<!`)`(?!`)([^`]+)`(?!`)", text)]
    starts = ("python ", "bash ", "torchrun ", "source ", "pip ", "srun ")
    return list(dict.fromkeys(line for line in (*lines, *inline) if line.startswith(starts)))


def script_and_options(command: str) -> tuple[str, list[str]]:
    words = shlex.split(command)
    place = next(i for i, word in enumerate(words) if word.endswith((".py", ".sh")))
    options = [re.split(r"\|", word)[0].strip("[]") for word in words[place + 1 :]]  # of several choices the first
    return words[place], [word for word in options if word]


def section(readme: str, title: str) -> str:
    """The section under ``## title`` in a README."""
    (found,) = [part for part in re.split(r"^## ", READMES[readme], flags=re.MULTILINE) if part.startswith(title + "\n")]
    return found


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def new_files(text: str) -> dict[str, str]:
    """The Python blocks that begin with a file name: name -> content."""
    return {match[1]: block for block in blocks(text, "python") if (match := re.match(r"# ([\w/]+\.py)\n", block))}


def scripts(text: str) -> list[str]:
    """The other Python blocks."""
    return [block for block in blocks(text, "python") if block not in new_files(text).values()]


def make_changes(text: str, root: Path) -> tuple[set[str], int]:
    """Write the new files of a text below ``root``, and apply its diffs. Their context must occur exactly once.

    Returns:
        The files that were touched, and the number of added lines, blank ones included.
    """
    touched, added = set(), 0
    for name, content in new_files(text).items():
        assert not (root / name).exists()
        (root / name).write_text(content)
        touched.add(name)
        added += content.count("\n")
    for diff in blocks(text, "diff"):
        header, _, rest = diff.partition("\n")
        path = root / header.removeprefix("+++ ")
        content = path.read_text()
        for hunk in rest.split("@@\n"):
            lines = hunk.splitlines(keepends=True)
            assert all(line[0] in " +" or line == "\n" for line in lines)
            before = "".join(line[1:] for line in lines if line[0] == " ")
            assert content.count(before) == 1, f"{path.name}: {before}"
            content = content.replace(before, "".join(line[1:] for line in lines))
            added += sum(line[0] == "+" for line in lines)
        path.write_text(content)
        touched.add(header.removeprefix("+++ "))
    return touched, added
