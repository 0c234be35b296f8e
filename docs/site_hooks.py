"""What MkDocs does not do by itself: equations as MathML, scripts as pages, code beside the notes of reading.md."""

import re
import sys
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files, InclusionLevel
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))

import quotes  # noqa: E402


def on_files(files, config):
    """The site's tree is the repository's, so that a link works here as it does on GitHub; scripts become pages."""
    of_theme = [file for file in files if file.src_dir != config.docs_dir]
    figures = [*ROOT.glob("benchmark/results/**/*.png"), *ROOT.glob("benchmark/results/*.gif")]
    others = [
        ROOT / "LICENSE",
        ROOT / "CITATION.cff",
        ROOT / "benchmark" / "experiments.toml",
        ROOT / "docs" / "site.css",
    ]
    paths = [path.relative_to(ROOT).as_posix() for path in [*quotes.pages(), *figures, *others]]
    ours = [File(path, str(ROOT), config.site_dir, config.use_directory_urls) for path in paths]
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("benchmark/*.py")]):
        name = path.relative_to(ROOT).as_posix()
        style = HtmlFormatter(full=True, title=name, linenos="inline", lineanchors="L", anchorlinenos=True)
        page = highlight(path.read_text(), PythonLexer(), style)
        page = page.replace("<head>", '<head><link rel="icon" href="data:,">')  # or browsers ask for one
        ours.append(File.generated(config, f"{name}.html", content=page, inclusion=InclusionLevel.NOT_IN_NAV))
    return Files(of_theme + ours)


def on_page_markdown(markdown, page, **_):
    """Code beside the notes, and links to the scripts' pages."""
    if page.file.src_uri == "docs/reading.md":
        markdown = beside_code(markdown)
    link = r"\]\((?P<script>(?:\.\./)?[\w/]+\.py)(?:#L(?P<line>\d+)[-L\d]*)?\)"

    def to_page(found):
        line = f"#L-{found['line']}" if found["line"] else ""
        return f"]({found['script']}.html{line})"

    return re.sub(link, to_page, markdown)


def beside_code(markdown):
    """Each note with the code from its definition to the next note's, in two columns."""
    lines = (ROOT / "ddpl_mpe.py").read_text().splitlines()
    introduction, *notes = re.split(r"^(?=## )", markdown, flags=re.MULTILINE)
    names = [quotes.LINK.search(note)["name"] for note in notes]
    firsts = [quotes.lines_of("ddpl_mpe.py", name)[0] for name in names] + [len(lines) + 1]
    for i, first in enumerate(firsts[:-1]):  # a section's headline belongs to what follows it
        while not lines[first - 2] or lines[first - 2].startswith("# ---"):
            first -= 1
        firsts[i] = first
    parts = [introduction]
    for note, first, after in zip(notes, firsts, firsts[1:]):
        while not lines[first - 1]:
            first += 1
        code = "\n".join(lines[first - 1 : after - 1]).rstrip()
        code = f'```python linenums="{first}"\n{code}\n```'
        columns = "".join(f"<div markdown>\n\n{column}\n\n</div>\n" for column in (note, code))
        parts.append(f'<div class="annotated" markdown>\n{columns}</div>\n')
    return "\n".join(parts)


def on_page_content(html, **_):
    """Equations become MathML, which browsers draw without a script."""

    def to_mathml(found):
        display = "block" if found["tag"] == "div" else "inline"
        latex = re.sub(r"\\tag\{(\d+)\}", r"\\qquad (\1)", unescape(found["latex"]).strip())
        return convert(latex, display=display)

    equation = r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?:span|div)>'
    return re.sub(equation, to_mathml, html, flags=re.DOTALL)
