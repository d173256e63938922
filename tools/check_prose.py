"""Checks the prose of Python code: docstrings and comments. Knows nothing of what the code does.

python -m tools.check_prose            exit 1 and say what to mend
python -m tools.check_prose --update   write smaller counts to tools/prose_allowed.txt
python -m tools.check_prose --report   list everything, also what is allowed

tools/prose_allowed.txt has what older code may still do: for each file and rule a count, which only
shrinks. A file that is not listed may do nothing of it. A file that moved takes its counts along.
"""

import argparse
import ast
import io
import re
import sys
import tokenize
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parent.parent
ALLOWED = Path("tools/prose_allowed.txt")
UPDATE = "python -m tools.check_prose --update"

MAX_SENTENCE_WORDS = 25
MAX_LINE_CHARACTERS = 100
MAX_COMMENT_LINES = 2

FIRST_SENTENCE, BANNED_WORDS, LONG_LINE, LONG_COMMENT = "first-sentence", "banned-words", "long-line", "long-comment"
REPORTED_ONLY = frozenset({LONG_COMMENT})

# ", for " means because where a clause follows: a pronoun, or a noun and its verb.
_PRONOUN = r"(?:it|he|she|they|we|you|there|this|that|these|those|nothing)\b"
_NOUN_AND_VERB = (
    r"(?:an?|the|its|their|each|every|no|one|such)(?: [\w'-]+){0,4}"
    r" (?:is|are|was|were|has|have|had|must|may|can|cannot|could|would|will|do|does|did)\b"
)
_PHRASES = r"\b(?:somebody|nobody|whoever|so many|so long|any more|for ever|is to be)\b"
_BANNED = re.compile(f"{_PHRASES}|, for (?:{_PRONOUN}|{_NOUN_AND_VERB})".replace(" ", r"[\s#]+"), re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n\s*\n")

Counts = Counter[tuple[str, str]]
"""How often a file breaks a rule, by path and rule."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A place that breaks a rule."""

    path: str
    line: int
    rule: str
    problem: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule}: {self.problem}"


@dataclass(frozen=True, slots=True)
class Passage:
    """A docstring, or a block of comment lines, as the source has it."""

    line: int
    text: str
    is_docstring: bool
    is_alone: bool
    """Whether no code stands before it on its line."""


def find_all(root: Path) -> list[Finding]:
    """What all written code below `root` breaks."""
    return [
        finding for path in written_files(root) for finding in find_in(path.read_text("utf-8"), path.relative_to(root))
    ]


def written_files(root: Path) -> Iterator[Path]:
    """The Python files that mypy checks, without generated ones."""
    settings = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["tool"]
    generated = [root / folder for folder in settings["ruff"]["extend-exclude"]]
    for folder in settings["mypy"]["files"]:
        for path in sorted((root / folder).rglob("*.py")):
            if not any(path.is_relative_to(each) for each in generated) and not _is_generated(path):
                yield path


def find_in(source: str, path: Path) -> Iterator[Finding]:
    """What one file breaks."""
    for passage in (*docstrings(source), *comments(source)):
        for line, rule, problem in _judge(passage):
            yield Finding(path.as_posix(), passage.line + line, rule, problem)


def docstrings(source: str) -> Iterator[Passage]:
    """Every string that stands as a statement: of modules, classes, functions and attributes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            text = ast.get_source_segment(source, node, padded=True) or ""
            yield Passage(node.lineno, text, is_docstring=True, is_alone=True)


def comments(source: str) -> Iterator[Passage]:
    """Comments; lines that stand alone below one another are one passage."""
    block: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        is_alone = token.line.lstrip().startswith("#")
        if block and (not is_alone or token.start != (block[-1].start[0] + 1, block[-1].start[1])):
            yield _block(block)
            block = []
        if is_alone:
            block.append(token)
        else:
            yield Passage(token.start[0], token.string, is_docstring=False, is_alone=False)
    if block:
        yield _block(block)


def compare(findings: list[Finding], allowed: Counts) -> list[str]:
    """What to do, one line each; nothing where the counts are those allowed."""
    counts = count(findings)
    lines = []
    for path, rule in sorted(counts - allowed):
        has, may = counts[path, rule], allowed[path, rule]
        lines += [str(finding) for finding in findings if (finding.path, finding.rule) == (path, rule)]
        lines.append(f"{path} breaks {rule} {has} times, {may} allowed: mend {has - may} of the above")
    if lower := sorted({path for path, _ in allowed - counts}):
        lines.append(f"{len(lower)} files break less than allowed ({lower[0]}, ...): run `{UPDATE}`")
    return lines


def shrink(counts: Counts, allowed: Counts, root: Path) -> list[str]:
    """Why the counts may not replace those allowed; one line for each rule broken more often.

    Counts of files that are gone may stand with others: the code may have moved there.
    """
    problems = []
    for rule in sorted({rule for _, rule in counts}):
        raised = {path: counts[path, rule] - allowed[path, rule] for path, each in counts if each == rule}
        num_raised = sum(number for number in raised.values() if number > 0)
        num_moved = sum(
            number for (path, each), number in allowed.items() if each == rule and not (root / path).exists()
        )
        if num_raised > num_moved:
            files = ", ".join(sorted(path for path, number in raised.items() if number > 0))
            problems.append(
                f"{rule} is broken {num_raised - num_moved} times more than allowed, in {files}: mend it there"
            )
    return problems


def count(findings: list[Finding]) -> Counts:
    """The findings of the rules that hold, counted."""
    return Counter((finding.path, finding.rule) for finding in findings if finding.rule not in REPORTED_ONLY)


def read_allowed(root: Path) -> Counts | None:
    """The counts of the allow list; None where there is no list."""
    if not (root / ALLOWED).exists():
        return None
    rows = (line.split() for line in (root / ALLOWED).read_text("utf-8").splitlines() if not line.startswith("#"))
    return Counter({(path, rule): int(number) for path, rule, number in rows})


def write_allowed(counts: Counts, root: Path) -> None:
    """Replaces the allow list."""
    rows = [f"{path} {rule} {number}" for (path, rule), number in sorted(counts.items())]
    text = "\n".join(
        ["# Rules of tools/check_prose.py that older code breaks. Counts only shrink: `" + UPDATE + "`.", *rows]
    )
    (root / ALLOWED).write_text(text + "\n", "utf-8")


def _judge(passage: Passage) -> Iterator[tuple[int, str, str]]:
    """Line within the passage, rule and problem of everything that it breaks."""
    for match in _BANNED.finditer(passage.text):
        yield (
            passage.text.count("\n", 0, match.start()),
            BANNED_WORDS,
            repr(" ".join(match[0].replace("#", "").split())),
        )
    lines = passage.text.splitlines()
    if passage.is_alone:
        for number, line in enumerate(lines):
            if len(line) > MAX_LINE_CHARACTERS:
                yield number, LONG_LINE, f"{len(line)} characters, at most {MAX_LINE_CHARACTERS}"
    if passage.is_docstring:
        num_words = len(_SENTENCE_END.split(passage.text.strip().lstrip("rRfF").strip("\"'"), 1)[0].split())
        if num_words > MAX_SENTENCE_WORDS:
            yield 0, FIRST_SENTENCE, f"{num_words} words, at most {MAX_SENTENCE_WORDS}"
    elif len(lines) > MAX_COMMENT_LINES:
        yield 0, LONG_COMMENT, f"{len(lines)} lines, at most {MAX_COMMENT_LINES}"


def _block(tokens: list[tokenize.TokenInfo]) -> Passage:
    text = "\n".join(token.line.rstrip() for token in tokens)
    return Passage(tokens[0].start[0], text, is_docstring=False, is_alone=True)


def _is_generated(path: Path) -> bool:
    with path.open(encoding="utf-8") as file:
        return file.readline().startswith(("# Generated from", '"""Generated from'))


def main(root: Path = REPO_ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--update", action="store_true", help="write smaller counts to the allow list")
    kinds.add_argument("--report", action="store_true", help="list everything, also what is allowed")
    arguments = parser.parse_args()
    findings, allowed = find_all(root), read_allowed(root)
    if arguments.report:
        print(*findings, sep="\n")
        return 0
    if arguments.update:
        problems = [] if allowed is None else shrink(count(findings), allowed, root)
        if not problems:
            write_allowed(count(findings), root)
    else:
        problems = compare(findings, allowed or Counter())
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
