"""What every exercise's checker is held to: it passes the solution and names what is wrong with a broken twin."""

import pytest


def both_tests(cases):
    """The two tests of cases (check, solution, {message: broken twin}), to be named by a test module."""
    twins = [(check, message, twin) for check, _, broken in cases for message, twin in broken.items()]

    @pytest.mark.parametrize("check, solution", [case[:2] for case in cases])
    def passes(check, solution, capsys):
        check(solution)
        assert capsys.readouterr().out.startswith("right: ")

    @pytest.mark.parametrize("check, message, broken", twins)
    def names_what_is_wrong(check, message, broken, capsys):
        with pytest.raises(AssertionError, match=message) as failed:
            check(broken)
        assert "\n" not in str(failed.value).split("\nassert")[0]
        assert capsys.readouterr().out == ""

    return passes, names_what_is_wrong
