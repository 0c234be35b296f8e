"""Bring the pages' references to the scripts up to date: code that they quote, lines that they link to.

    python docs/quotes.py    # rewrites README.md and docs/*.md where a script has changed since

Two things in a page follow the scripts, by the name of a function, a class or a method:

- a link such as [`issm_weights`](../ddpl_mpe.py#L1-L2) gets the lines of that definition;
- a block that starts with ```python title="ddpl_mpe.py: issm_weights" gets its text. After a second colon may stand
  the comment with which a part of it starts: "ddpl_mpe.py: update_diffusion: 2. Weigh" is that part, up to the next
  numbered comment.

A test fails where a page is behind, or a name is gone.
"""

import ast
import re
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\[`(?P<name>[\w.]+)`\]\((?P<folder>(?:\.\./)?)(?P<script>[\w/]+\.py)#L[-L\d]+\)")
QUOTE = re.compile(r'```python title="(?P<title>[^"]+)"\n.*?^```$', re.DOTALL | re.MULTILINE)


def definitions(script: str) -> dict[str, ast.stmt]:
    """The functions and classes of a script, and their methods as Class.method, in its order."""
    found = {}
    for node in ast.parse((ROOT / script).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
            methods = [inner for inner in node.body if isinstance(inner, ast.FunctionDef)]
            found |= {f"{node.name}.{inner.name}": inner for inner in methods}
    return found


def lines_of(script: str, name: str) -> tuple[int, int]:
    """First and last line of a definition, decorators included. Raises KeyError if the script has none of that name."""
    node = definitions(script)[name]
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]), node.end_lineno


def quoted(title: str) -> str:
    """The text that `<script>: <definition>[: <comment>]` names. Raises KeyError if it is not there."""
    script, name, *part = title.split(": ")
    first, last = lines_of(script, name)
    lines = (ROOT / script).read_text().splitlines()[first - 1 : last]
    if part:
        numbered = [i for i, line in enumerate(lines) if re.match(r" +# \d+\. ", line)]
        (start,) = [i for i in numbered if lines[i].strip().startswith(f"# {part[0]}")] or [None]
        if start is None:
            raise KeyError(title)
        lines = lines[start : next((i for i in numbered if i > start), len(lines))]
    return dedent("\n".join(lines)).strip()


def updated(text: str) -> str:
    """The page with every reference as it should be."""

    def link(found: re.Match) -> str:
        first, last = lines_of(found["script"], found["name"])
        return f"[`{found['name']}`]({found['folder']}{found['script']}#L{first}-L{last})"

    def quote(found: re.Match) -> str:
        return f'```python title="{found["title"]}"\n{quoted(found["title"])}\n```'

    return QUOTE.sub(quote, LINK.sub(link, text))


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


if __name__ == "__main__":
    for page in pages():
        text = page.read_text()
        if (new := updated(text)) != text:
            page.write_text(new)
            print(f"{page.relative_to(ROOT)} follows the scripts again")
