"""Personal data and secrets that have a form: what to look for before a text leaves the house.

Found are e-mail addresses, telephone numbers, IBANs, payment card numbers and keys of services. Names, postal addresses
and all else without a form are not found, and a row of digits may look like a telephone number and be none. Counts and
row ids leave this module, never the values.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

# Country and length of an IBAN. Source: SWIFT's IBAN registry.
IBAN_LENGTHS = (
    "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 DO28 EE20 EG29 "
    "ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 "
    "LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 PT25 "
    "QA29 RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20 YE30"
)
IBAN_FORMS = "|".join(rf"{c[:2]}\d\d(?:[ -]?[A-Z0-9]){{{int(c[2:]) - 4}}}" for c in IBAN_LENGTHS.split())

# The prefixes under which services hand out keys, and `password: ...` with a digit in what follows. Repetitions that
# may fail at their end are bounded, so that no text makes the search quadratic.
KEY_FORMS = "|".join(
    (
        r"\bsk-(?=[\w-]{0,99}\d)[\w-]{20,200}",  # OpenAI, Anthropic and others
        r"\b[spr]k_(?:live|test)_\w{16,}",  # Stripe
        r"\bgh[oprsu]_\w{36,}|\bgithub_pat_\w{22,}|\bglpat-[\w-]{20,}",  # GitHub, GitLab
        r"\bhf_[A-Za-z0-9]{30,}",  # Hugging Face
        r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",  # Amazon
        r"\bAIza[\w-]{35}",  # Google
        r"\bxox[abeoprs]-[\w-]{10,}",  # Slack
        r"\beyJ[\w-]{8,999}\.[\w-]{8,999}\.[\w-]+",  # a JSON web token
        r"-----BEGIN (?:[A-Z]+ ){0,3}PRIVATE KEY-----",
        r"://[^\s/:@]{1,64}:[^\s/@]{1,200}@",  # a password in an address
        r"\bBearer\s+[\w.~+/-]{20,500}",  # an HTTP header
        r"(?i:api[ _-]?key|secret|token|passw(?:or)?d)[\"']?\s{0,3}[:=]\s{0,3}[\"']?"  # whatever it opens
        r"(?=[^\s\"',;]{0,99}\d)[^\s\"',;]{8,200}",
    )
)


@dataclass(frozen=True)
class Kind:
    """A kind of finding: its name, its form, and a proof for forms that much else has too."""

    name: str
    form: re.Pattern[str]
    proven: Callable[[str], bool] = bool


def is_iban(text: str) -> bool:
    """Tell whether the check digits of an IBAN are right: rearranged and with A = 10, the number is 1 modulo 97."""
    compact = re.sub(r"[ -]", "", text).upper()
    return int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1


def is_card_number(text: str) -> bool:
    """Tell whether digits have a card network's first digit and pass Luhn's check; one number in ten does by chance."""
    digits = [int(c) for c in text if c.isdigit()]
    doubled = [sum(divmod(2 * d, 10)) for d in digits[-2::-2]]
    return digits[0] in (2, 3, 4, 5, 6) and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


KINDS = (
    Kind("key or password", re.compile(KEY_FORMS)),
    Kind("e-mail address", re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}\b")),
    Kind("IBAN", re.compile(rf"(?<![A-Z0-9])(?:{IBAN_FORMS})(?![A-Z0-9])", re.ASCII | re.IGNORECASE), is_iban),
    Kind("payment card", re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-])", re.ASCII), is_card_number),
    Kind(
        "telephone number",
        re.compile(
            r"(?<![\w+])\+\d{1,3}(?:[ .()/-]{0,2}\d){6,14}(?!\w)"  # +49 30 1234567
            r"|(?<![\w.-])\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4}(?![\w-])"  # (212) 555-0123
            r"|(?<![\w.-])0\d{1,4}[ /-]\d{3}[\d -]{1,8}\d(?![\w-])",  # 030 1234567
            re.ASCII,
        ),
    ),
)
"""In the order in which they are looked for: what is found as one kind is not looked at again for another."""


def count_kinds(text: str) -> Counter[str]:
    """Return how often each kind occurs in a text."""
    found: Counter[str] = Counter()

    for kind in KINDS:

        def blank(match: re.Match[str], kind: Kind = kind) -> str:
            if not kind.proven(match.group()):
                return match.group()
            found[kind.name] += 1
            return "\n"  # no form reaches over a line break, except `key: value`

        text = kind.form.sub(blank, text)
    return found


def scan(texts: Iterable[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """Return, for each kind, how often it occurs in (row id, text), and the ids of the rows, in order.

    A kind that does not occur has the count 0: it was looked for.
    """
    found: dict[str, dict[str, Any]] = {kind.name: {"count": 0, "rows": []} for kind in KINDS}
    for row, text in texts:
        for name, count in count_kinds(text).items():
            found[name]["count"] += count
            if row not in found[name]["rows"][-1:]:
                found[name]["rows"].append(row)
    return found
