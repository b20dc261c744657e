"""A user's mistake ends the program with its message; whoever asks for the stack gets it, and a bug always shows it."""

from __future__ import annotations

import pytest

from quantsweep.errors import ConfigurationErrors
from quantsweep.hydra_plugin.mistakes import shown_plainly


def test_the_message_is_all_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    error = ConfigurationErrors(["a is wrong", "b is wrong"])
    with pytest.raises(SystemExit) as caught, shown_plainly():
        raise error
    assert caught.value.code == str(error), "a text as exit code: printed to stderr, status 1"


def test_who_asks_for_the_stack_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ConfigurationErrors), shown_plainly():
        raise ConfigurationErrors(["a is wrong"])


def test_a_bug_is_not_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with pytest.raises(ZeroDivisionError), shown_plainly():
        _ = 1 / 0
