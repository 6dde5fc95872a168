"""The commands that the README holds."""

import re
import shlex

from tests.helpers import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """The commands of the README's bash blocks and of its inline code, with continued lines joined."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)).replace("\\\n", " ")
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in blocks.splitlines()]
    inline = [" ".join(text.split()) for text in re.findall(r"(?<!`)`(?!`)([^`]+)`(?!`)", TEXT)]
    starts = ("python ", "bash ", "torchrun ", "source ", "pip ", "srun ")
    return list(dict.fromkeys(line for line in (*lines, *inline) if line.startswith(starts)))


def script_and_options(command: str) -> tuple[str, list[str]]:
    words = shlex.split(command)
    place = next(i for i, word in enumerate(words) if word.endswith((".py", ".sh")))
    options = [re.split(r"\|", word)[0].strip("[]") for word in words[place + 1 :]]  # one of the choices
    return words[place], [word for word in options if word]
