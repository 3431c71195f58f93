"""Checks of docstrings, comments and pages against the rules for prose in CONTRIBUTING.md."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

# Words and phrases that hide the actor or the action. CONTRIBUTING.md says what to write instead.
PHRASES = re.compile(
    r"\b(whoever|nobody|anew|so many|as many as|errands?|heirs?|farewells?|shall|tells? of|hears?|asks? after|at work"
    r"|is had|is told|are told(?! apart)|the world|for long(?!-)|in hand|a word|such a|one of them)\b",
    re.IGNORECASE,
)
_QUOTED = re.compile(r"`[^`]*`|\"[^\"]*\"")
# Noun clauses as the beginning of a docstring.
OPENINGS = re.compile(r"(What|Whether|Who|Whom|Whose|How|Of|The same)\b")
# Third-person verbs that are no plural nouns: wrong at the beginning of any docstring.
_VERBS = (
    "Accepts Adds Allocates Answers Appends Applies Asks Awaits Begins Brings Chooses Cleans Clears Closes Collects"
    " Compares Computes Connects Contains Converts Copies Creates Decides Decodes Deletes Describes Does Drops Encodes"
    " Ends Ensures Enters Expects Feeds Fetches Fills Finds Follows Forgets Gets Gives Goes Handles Has Holds Is Joins"
    " Keeps Launches Leaves Lets Listens Loads Looks Makes Marks Moves Opens Parses Passes Prepares Prints Provides"
    " Pulls Puts Raises Reads Receives Recycles Refuses Registers Rejects Releases Removes Renders Replaces Resolves"
    " Returns Rings Says Sees Sends Serves Shows Solves Speaks Starts Stops Stores Submits Subtracts Takes Tells"
    " Terminates Tries Turns Validates Verifies Waits Wakes Watches Wraps Writes Yields"
)
# Third-person verbs that may also be plural nouns: wrong at the beginning of a function's docstring.
_AMBIGUOUS = (
    "Builds Calls Changes Checks Counts Cuts Draws Extracts Folds Forks Frames Limits Lists Locks Logs Measures Merges"
    " Names Notes Offers Orders Plans Polls Publishes Pushes Queries Records Replays Reports Requests Resets Restarts"
    " Runs Samples Saves Scales Sets Signs Splits States Steps Tests Trains Updates Uses Walks Works"
)
VERBS = frozenset(_VERBS.split())
FUNCTION_VERBS = VERBS | frozenset(_AMBIGUOUS.split())


@dataclass(frozen=True)
class Fault:
    """A sentence that breaks a rule."""

    line: int
    text: str


def of_python(source: str) -> list[Fault]:
    """Return the faults in the docstrings and comments of a module."""
    return sorted([*_docstrings(ast.parse(source)), *_comments(source)], key=lambda fault: fault.line)


def of_text(text: str) -> list[Fault]:
    """Return the faults in a page of Markdown; code blocks and quoted words are not checked."""
    faults, fenced = [], False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
        elif not fenced:
            faults += _phrases(line, number)
    return faults


def _docstrings(tree: ast.Module) -> Iterator[Fault]:
    for node in ast.walk(tree):
        for text, line in _attribute_docstrings(node):
            yield from _docstring(text, line)
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node, clean=False)
        if docstring is None:
            continue
        line = node.body[0].lineno
        yield from _docstring(docstring, line)
        first = docstring.split(maxsplit=1)[0].rstrip(".,:;") if docstring.strip() else ""
        if first in (FUNCTION_VERBS if _is_function(node) else VERBS):
            yield Fault(line, f'docstring begins with "{first}"; use the imperative, or a noun phrase')


def _docstring(text: str, line: int) -> Iterator[Fault]:
    """Yield the faults that are faults in every kind of docstring."""
    yield from (fault for n, part in enumerate(text.splitlines()) for fault in _phrases(part, line + n))
    if opening := OPENINGS.match(text.lstrip()):
        yield Fault(line, f'docstring begins with "{opening[0]}"')


def _attribute_docstrings(node: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield the strings that describe an assigned name (PEP 257), each with its line."""
    if not isinstance(node, ast.Module | ast.ClassDef):
        return
    for statements in pairwise(node.body):
        match statements:
            case (ast.Assign() | ast.AnnAssign(), ast.Expr(value=ast.Constant(value=str(text)), lineno=line)):
                yield text, line


def _is_function(node: ast.AST) -> bool:
    """Return True for a function or method that is no property."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    names = {getattr(each, "id", getattr(each, "attr", "")) for each in node.decorator_list}
    return not names & {"property", "cached_property"}


def _comments(source: str) -> Iterator[Fault]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield from _phrases(token.string, token.start[0])


def _phrases(text: str, line: int) -> list[Fault]:
    return [Fault(line, f'"{found[0]}"') for found in PHRASES.finditer(_QUOTED.sub("", text))]
