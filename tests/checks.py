"""What every exercise's checker is held to: it passes the solution and names what is wrong with a broken twin."""

import pytest


def passes(check, solution, capsys):
    check(solution)
    assert capsys.readouterr().out.startswith("right: ")


def names_what_is_wrong(check, message, broken, capsys):
    with pytest.raises(AssertionError, match=message) as failed:
        check(broken)
    assert "\n" not in str(failed.value).split("\nassert")[0]
    assert capsys.readouterr().out == ""


def twins(cases):
    """(check, message, broken twin) of cases (check, solution, {message: broken twin})."""
    return [(check, message, twin) for check, _, broken in cases for message, twin in broken.items()]
