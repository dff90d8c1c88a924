"""One word, one thing; one thing, one word: what has been given up does not come back, as far as a search can tell."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUFFIXES = (".py", ".md", ".cpp", ".cu", ".h", ".inl", ".toml", "Makefile")

# American spelling, of file names too.
_ISE = (
    "apolog|author|capital|categor|character|critic|custom|discret|equal|factor|final|general|harmon|initial|linear|local"
    "|material|maxim|memor|minim|normal|optim|organ|orthogonal|parallel|parametr|penal|priorit|quant|random|real|recogn"
    "|regular|serial|special|stabil|standard|summar|symmetr|synchron|token|util|vector|visual"
)
_OUR = "behavi|col|fav|flav|harb|hon|lab|neighb|rum|vap"
_DOUBLED = "cancel|channel|label|level|model|signal|total|travel|tunnel"
BRITISH = re.compile(
    rf"(?:(?:{_ISE})is(?:e[drs]?|ers|ing|ations?)|(?:{_OUR})our\w*|(?:{_DOUBLED})l(?:ed|er|ing)|analyse[drs]?"
    r"|\b(?:un)?(?:cent|fib|lit|met)res?|grey\w*|artefact\w*|judgement|whilst|amongst|learnt|(?:mis)?spelt"
    r"|licence\w*|defence|catalogue\w*|programmes?|skilful|fulfil|ageing)\b",
    re.IGNORECASE,
)

# {what is wrong: (where, what finds it, an example)}
RETIRED = {
    "F is torch.nn.functional": (
        r".*\.(py|md)",
        r"from torch\.nn import functional|from torch\.nn\.functional import|\bnn\.functional\.(?!F\b)[a-z]",
        "y = torch.nn.functional.gelu(x)",
    ),
    'a message says "X must be ..., got ..."': (
        r"(petl_ext|csrc/ops|examples)/.*",
        r"""(["']|: )expected [\w{'\[]|\bmust\b[^"]*, found\b""",
        'raise ValueError(f"{path}: expected a list, got {value}")',
    ),
    "searches and models save and load": (
        r"(petl_ext/(search/state|models/).*|(?!CHANGELOG).*\.md|python_tests/.*)",
        r"\bfrom_folder\b|def (to|from)_json\b|(Search|search)\.(to|from)_json\b",
        "DepthSearch.from_json(path, model)",
    ),
    "device and dtype are a factory": (r".*\.py", r"\*\*(place|where|like)\b", "nn.Linear(8, 8, **place)"),
    "tests run on devices": (
        r"(python_tests|bench)/.*",
        r"\bfrom places\b|\bdef test_\w+\(place\b|\"place\"|\bplace\.(device|entered|runs_cuda)",
        "def test_values(place, tested):",
    ),
}

# {word in a name: where it has its one meaning}; elsewhere another name says what is meant.
NAMES = {
    "kind": (
        "petl_ext/patching/",
        "petl_ext/attaching/methods/adapter.py",
        "petl_ext/peft/config.py",  # the same, in PEFT's configuration
        "python_tests/doors/test_peft_adapter.py",
        "python_tests/patching/",
    ),
    "place": (
        "petl_ext/attaching/",
        "petl_ext/models/dvp/adapters.py",
        "python_tests/models/test_dvp_",  # where its adapters go
        "python_tests/support/dvp_checks.py",
        "python_tests/support/original_checkpoints.py",
    ),
    "placement": ("petl_ext/search/", "petl_ext/cli.py", "petl_ext/demo/dvp/"),
}


def files():
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    found = [name for name in names if name.endswith(SUFFIXES) and (ROOT / name).exists()]
    assert len(found) > 300
    return [name for name in found if name != Path(__file__).relative_to(ROOT).as_posix()]


def lines_with(pattern, where=".*"):
    for name in files():
        if re.fullmatch(where, name):
            for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").split("\n"), 1):
                if re.search(pattern, line):
                    yield f"{name}:{number}: {line.strip()}"


def names_made_in(source):
    """Of variables, arguments and classes; those of tests are sentences."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("test_"):
            yield node.name


def words_of(name):
    """The words of a name, each without the s of a plural."""
    return {word.lower().removesuffix("s") for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


def test_spelling_is_american():
    assert list(lines_with(BRITISH)) == []
    assert [name for name in files() if BRITISH.search(re.sub(r"[\W_]+", " ", name))] == []


@pytest.mark.parametrize("line", ["Initialised, then", "normalises(x)", "the neighbour's", "a labelled row", "metres"])
def test_british_spelling_is_found(line):
    assert BRITISH.search(line)


@pytest.mark.parametrize("line", ["surprised by noise, raise", "four", "pre-trained METER", "compromise", "promises"])
def test_other_words_are_left_alone(line):
    assert not BRITISH.search(line)


@pytest.mark.parametrize("rule", RETIRED)
def test_what_was_given_up_does_not_come_back(rule):
    where, pattern, example = RETIRED[rule]
    assert re.search(pattern, example)
    assert list(lines_with(pattern, where)) == []


def test_a_word_in_a_name_has_one_meaning():
    wrong = [
        f"{name}: {made}"
        for name in files()
        if name.endswith(".py")
        for made in sorted(set(names_made_in((ROOT / name).read_text(encoding="utf-8"))))
        for word in words_of(made) & NAMES.keys()
        if not name.startswith(NAMES[word])
    ]
    assert wrong == []


def test_a_name_s_words_are_found():
    assert list(names_made_in("def f(place_of):\n    kinds = 1")) == ["f", "place_of", "kinds"]
    assert words_of("_own_places") >= {"place"} and words_of("KINDS") == words_of("Kind") == {"kind"}
    assert words_of("replaced") == {"replaced"}
