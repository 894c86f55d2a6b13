"""Sets as values: strings, domains, messages."""

from __future__ import annotations

import dataclasses

import pytest

import drrlhf as dr

WRITTEN = {
    "erm": dr.ERM(),
    "tv:0.1": dr.TV(radius=0.1),
    "kl:0.1": dr.KL(radius=0.1),
    "kl:temperature=-1": dr.KL(temperature=-1.0),
    "chi2:0.5": dr.ChiSquare(radius=0.5),
    "chi2:penalty=1": dr.ChiSquare(penalty=1.0),
    "cvar:0.3": dr.CVaR(alpha=0.3),
    "cvar:0.3,trim=0.05": dr.CVaR(alpha=0.3, trim=0.05),
    "cvar:0.3,temperature=2": dr.CVaR(0.3, 2.0),
    "group:4": dr.Group(4),
    "group:4,step_size=0.05": dr.Group(num_groups=4, step_size=0.05),
}


@pytest.mark.parametrize("text,ambiguity", WRITTEN.items())
def test_strings_round_trip(text, ambiguity):
    assert dr.parse_ambiguity(text) == ambiguity
    assert str(ambiguity) == text
    assert dr.parse_ambiguity(ambiguity) is ambiguity
    assert dr.parse_ambiguity(f" {text.upper()} ") == ambiguity


def test_sets_are_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        dr.TV(0.1).radius = 0.2
    assert len({dr.TV(0.1), dr.TV(radius=0.1), dr.TV(0.2)}) == 2


BAD = [
    (lambda: dr.TV(1.5), r"TV: radius must lie in \[0, 1\], got 1.5"),
    (lambda: dr.TV(-0.1), r"\[0, 1\]"),
    (lambda: dr.TV(float("nan")), r"\[0, 1\], got nan"),
    (lambda: dr.TV("0.1"), "must be a number.*str"),
    (lambda: dr.KL(radius=-1), r"\[0, inf\)"),
    (lambda: dr.KL(radius=float("inf")), r"\[0, inf\)"),
    (lambda: dr.KL(temperature=0), "without 0"),
    (lambda: dr.KL(), "exactly one of radius= or temperature=, got neither"),
    (lambda: dr.KL(0.1, 1.0), "exactly one"),
    (lambda: dr.ChiSquare(penalty=0), r"\(0, inf\)"),
    (lambda: dr.CVaR(0), r"CVaR: alpha must lie in \(0, 1\], got 0"),
    (lambda: dr.CVaR(1.1), r"\(0, 1\]"),
    (lambda: dr.CVaR(0.5, temperature=-1), r"\(0, inf\)"),
    (lambda: dr.CVaR(0.5, trim=1.0), r"trim must lie in \[0, 1\), got 1.0"),
    (lambda: dr.Group(0), "integers >= 1"),
    (lambda: dr.Group(2.5), "integers >= 1"),
    (lambda: dr.Group(2, -1), r"step_size must lie in \[0, inf\)"),
    (lambda: dr.parse_ambiguity("tvv:0.1"), "did you mean 'tv'"),
    (lambda: dr.parse_ambiguity("robust"), "unknown ambiguity 'robust'.*known sets"),
    (lambda: dr.parse_ambiguity("chisquare:0.1"), "did you mean 'chi2'"),
    (lambda: dr.parse_ambiguity("chi-square:0.1"), "did you mean 'chi2'"),
    (lambda: dr.parse_ambiguity("tv"), "TV needs radius.*'tv:0.1'"),
    (lambda: dr.parse_ambiguity("tv:x"), "radius must be a number, got 'x'"),
    (lambda: dr.parse_ambiguity("tv:radios=1"), "did you mean 'radius'"),
    (lambda: dr.parse_ambiguity("tv:0.1,radius=0.2"), "given twice"),
    (lambda: dr.parse_ambiguity("cvar:trim=0.1"), "CVaR needs alpha"),
    (lambda: dr.parse_ambiguity("erm:0.1"), "expected key=value"),
    (lambda: dr.parse_ambiguity(0.1), "a string such as 'tv:0.1'"),
]


@pytest.mark.parametrize("call,message", BAD)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
