"""What the check of pages finds: wrong output, commands without a run, annotations that have gone stale."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import PageError, matches, read
from run import main, run_python

PRINTS = """Text.

```python
for word in ("one", "two"):
    print(word, 12)
```

```text
one 12
two 12
```
"""


def page(folder: Path, text: str) -> Path:
    path = folder / "page.md"
    path.write_text(text)
    return path


def test_a_page_that_prints_what_it_shows_passes(tmp_path: Path) -> None:
    path = page(tmp_path, PRINTS)
    assert [block.kind for block in read(path).blocks] == ["python", "text"]
    run_python(read(path))


def test_a_page_that_prints_something_else_fails_and_can_be_updated(tmp_path: Path) -> None:
    path = page(tmp_path, PRINTS.replace("two 12\n```", "two 13\nthree\n```"))
    with pytest.raises(PageError, match=r"line 9.*prints something else"):
        run_python(read(path))
    run_python(read(path), update=True)
    assert path.read_text() == PRINTS


def test_an_error_in_a_block_comes_through_with_its_line_in_the_page(tmp_path: Path) -> None:
    path = page(tmp_path, PRINTS.replace("    print(word, 12)", "    raise KeyError(word)"))
    with pytest.raises(KeyError) as error:
        run_python(read(path))
    assert error.traceback[-1].lineno + 1 == 5  # counted from 0
    assert str(error.traceback[-1].path) == str(path)


def test_blocks_share_one_namespace_hidden_ones_too(tmp_path: Path) -> None:
    run_python(read(page(tmp_path, "<!-- python\nword = 'hidden'\n-->\n\n```python\nprint(word)\n```\n\n```text\nhidden\n```\n")))


def test_numbers_may_vary_where_the_page_says_so(tmp_path: Path) -> None:
    text = PRINTS.replace("```text", "<!-- varies -->\n\n```text").replace("two 12\n```", "two 9,999.5\n```")
    run_python(read(page(tmp_path, text)))
    with pytest.raises(PageError, match="prints something else"):
        run_python(read(page(tmp_path, text.replace("two 9,999.5", "two and 9"))))


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        ("a\nb", "a  \nb\n", True),
        ("a ... c", "a b b c", True),
        ("a ... c", "a b b d", False),
        ("1.5 %", "2.5 %", False),
        ("", "anything", False),
    ],
)
def test_matching(expected: str, printed: str, same: bool) -> None:
    assert matches(expected, printed) is same


COMMANDS = """
```sh
echo one   # a comment
echo \\
  two
```

In the text: `make everything`, `make`, `python -c "print(1)"`, and `not_a_command here`.
"""


def test_commands_of_blocks_and_of_the_text(tmp_path: Path) -> None:
    found = dict(read(page(tmp_path, COMMANDS + "<!-- short\nmake everything => make a part\n-->\n")).commands)
    assert found == {
        "echo one": "echo one",
        "echo two": "echo two",
        "make everything": "make a part",
        'python -c "print(1)"': 'python -c "print(1)"',
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("```\nx\n```\n", "needs a language"),
        ("```python\nx\n", "and an end"),
        ("<!-- short\nmake nothing => true\n-->\n", "'make nothing', which the page does not have"),
        ("`make all`\n<!-- short\nmake all\n-->\n", "write `command => short`"),
        ("`make all`\n<!-- elsewhere\nmake all => .ci/run\n-->\n", "run by .ci/run, which does not have it"),
        ("`make test`\n<!-- elsewhere\nmake test => no/such\n-->\n", "run by no/such, which does not have it"),
    ],
)
def test_pages_that_cannot_be_checked_are_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(PageError) as error:
        read(page(tmp_path, text))
    assert says in str(error.value)


def test_commands_run_and_the_failing_one_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    good = page(tmp_path, "```sh\ntest -e {tmp}\n```\n")
    assert main(["commands", str(good)]) == 0
    bad = page(tmp_path, "```sh\necho here I am; false\n```\n")
    assert main(["commands", str(bad)]) == 1
    printed = capfd.readouterr().out
    assert "here I am" in printed
    assert "1 failed" in printed


def test_commands_run_beside_the_files_of_their_page(tmp_path: Path) -> None:
    text = '```python title="program.py"\nprint("hello")\n```\n\n```sh\npython program.py | grep -q hello\n```\n'
    assert main(["commands", str(page(tmp_path, text))]) == 0
