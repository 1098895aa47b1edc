"""The scanner finds what has the form of personal data or of a secret, and tells counts and rows only."""

from __future__ import annotations

import json

import pytest

from tuneshift.report.privacy import KINDS, count_kinds, is_card_number, is_iban, scan

HEX = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("write to jane.doe+list@mail.example.co.uk, please", "e-mail address"),
        ("<jörg@exämple.de>", "e-mail address"),
        ("pay to DE89 3704 0044 0532 0130 00 AND call", "IBAN"),
        ("GB82WEST12345698765432", "IBAN"),
        ("nl91abna0417164300", "IBAN"),
        ("card 4111 1111 1111 1111 exp 12/30", "payment card"),
        ("378282246310005", "payment card"),
        ("5555-5555-5555-4444", "payment card"),
        ("call +49 30 1234567 now", "telephone number"),
        ("call (212) 555-0123.", "telephone number"),
        ("Tel.: 030 1234567", "telephone number"),
        ("OPENAI_API_KEY=sk-proj-abcdefghij0123456789", "key or password"),
        (f"hf_{HEX}", "key or password"),
        (f"ghp_{HEX}", "key or password"),
        ("AKIAIOSFODNN7EXAMPLE", "key or password"),
        ("-----BEGIN RSA PRIVATE KEY-----", "key or password"),
        ("password: hunter2hunter2", "key or password"),
        ("psql postgres://jane:p4ssw0rd@db.example/x", "key or password"),
        ("curl -H 'Authorization: Bearer abcdef1234567890abcdef'", "key or password"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-DEF_123", "key or password"),
    ],
)
def test_each_kind_is_found_once_and_as_that_kind(text: str, kind: str) -> None:
    assert dict(count_kinds(text)) == {kind: 1}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GB81WEST12345698765432",  # wrong check digits
        "4111 1111 1111 1112",  # fails Luhn's check
        "1234567812345670",  # passes it, but no network's first digit
        "3 + 4 * 12345 = 49383, on 2026-11-23 at 12:30:45, room 0123",
        "version 1.12.345 of 10.0.0.1, p = 3.0517578125e-05",
        "@user wrote a@b, and the password: required",
        "the sk-learn library, a token: value, task-oriented-dialogue-systems-2",
        f"sha256 {HEX}",
        "Bearer of news, see http://localhost:8000/users@home and https://example.org/a:b",
        "Janet has 16 eggs, 3,000,000 dollars and 5 1/2 acres",
    ],
)
def test_what_only_looks_a_little_like_it_is_not_found(text: str) -> None:
    assert count_kinds(text) == {}


def test_checksums_are_those_of_the_published_examples() -> None:
    assert is_iban("GB82 WEST 1234 5698 7654 32")
    assert not is_iban("GB28 WEST 1234 5698 7654 32")
    assert is_card_number("4242424242424242")
    assert not is_card_number("4242424242424241")


def test_two_findings_in_a_row_count_twice_and_name_the_row_once() -> None:
    found = scan([("r1", "a@b.example c@d.example"), ("r1", "e@f.example"), ("r2", "nothing"), ("r3", "+4930123456")])
    assert set(found) == {kind.name for kind in KINDS}
    assert found["e-mail address"] == {"count": 3, "rows": ["r1"]}
    assert found["telephone number"] == {"count": 1, "rows": ["r3"]}
    assert found["IBAN"] == {"count": 0, "rows": []}


def test_the_values_never_leave_the_scanner() -> None:
    said = json.dumps(scan([("row", "jane@mail.example +49 30 1234567 4111111111111111")]))
    assert not any(value in said for value in ("jane", "1234567", "4111"))


@pytest.mark.parametrize(
    "piece", ["a", "a@", "a.", "1 ", "+1", "DE89", "eyJaaaaaaaa-", "token:", "sk-", "://a:", "Bearer "]
)
def test_a_long_hostile_text_comes_to_an_end(piece: str) -> None:
    count_kinds(piece * (100_000 // len(piece)))  # a quadratic search would take minutes
