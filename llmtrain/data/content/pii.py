"""Personal data and secrets in texts: found, counted, and replaced by a placeholder of their kind.

A compiled loop finds the few places where something could begin (an @ between the right letters, four numbers
with dots, `ghp_`, `-----BEGIN`), and only there a pattern decides. The patterns are strict: what they take is
almost surely what they say. What is taken and what is not, with the reasons and measured rates of false
alarms: docs/data_content.md.

Sources: address syntax RFC 5321 and RFC 5322 (a common part of them); special address blocks from the IANA
registries of IPv4 and IPv6 (RFC 6890); country codes from ITU-T E.164 (its list of 2016); telephone numbers
of North America from the NANP's numbering rules; keys in the shapes that their makers document.
"""

from __future__ import annotations

import ipaddress
import itertools
import math
import re
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain.compiled import compiled
from llmtrain.data.content.config import PII_KINDS, PiiConfig

Bytes = npt.NDArray[np.uint8]
Offsets = npt.NDArray[np.int64]

EMAIL, IP_ADDRESS, PHONE, API_KEY, PRIVATE_KEY = range(len(PII_KINDS))
_ASSIGNED = len(PII_KINDS)
"""A candidate of `assigned_secrets`; it counts as an API key."""

_LONGEST_KEY = 4096
_LONGEST_PEM = 1 << 15

# -- e-mail ------------------------------------------------------------------------------------------------

_GENERIC_DOMAINS = frozenset(
    b"com org net edu gov mil int arpa info biz name pro aero coop museum jobs mobi travel tel cat asia post "
    b"app dev page blog cloud online site website shop store tech xyz top club live life world today news "
    b"email digital agency company solutions services systems network software academy education university "
    b"school institute foundation health care center group team global international media studio design art "
    b"photography video music games space zone social community support help legal law tax finance financial "
    b"bank insurance capital fund ventures holdings consulting engineering energy green eco bio science "
    b"berlin hamburg koeln bayern wien paris london nyc amsterdam tokyo quebec scot wales swiss africa eus "
    b"gal google microsoft apple amazon bmw".split()
)
"""The usual generic top-level domains. Any of two letters counts as a country's."""
_NO_COUNTRIES = (b"js", b"ts", b"db")
"""Two letters that end file names and are no country's domain."""

# -- addresses ---------------------------------------------------------------------------------------------

_NOT_PUBLIC_4 = tuple(
    ipaddress.IPv4Network(block)
    for block in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
        "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15",
        "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
    )
)  # fmt: skip
_PUBLIC_6 = ipaddress.IPv6Network("2000::/3")
_NOT_PUBLIC_6 = tuple(
    ipaddress.IPv6Network(block) for block in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
)
_IPV4 = re.compile(
    rb"(?<![\w.+~^-])((?:0|[1-9]\d{0,2})\.(?:0|[1-9]\d{0,2})\.(?:0|[1-9]\d{0,2})\.(?:0|[1-9]\d{0,2}))"
    rb"(?![\w+-]|\.[\w*])"
)
_VERSION_BEFORE = re.compile(
    rb"(?:\b(?:versions?|ver\.?|release|rev\.?|revision|build|section|sect\.|chapter|figure|table|oid|v8 to|"
    rb"(?:up|down)(?:grad|dat)e[sd]?(?: \w+)? to|chrom(?:e|ium)|firefox|opera|linux)|"
    rb"[=<>~!]=|\xc2\xa7)[\s:\"'(]*\Z",
    re.IGNORECASE,
)
_ADDRESS_BEFORE = re.compile(
    rb"(?:\bipv?4?s?|\baddr(?:ess)?(?:es)?|\bhost(?:name)?|\bserver|\bdns|\binet|\bping|\bnameserver|\bssh|"
    rb"\bcurl|://|@)[\s:=\"'(]*\Z",
    re.IGNORECASE,
)
_ADDRESS_AFTER = re.compile(rb":[1-9]\d{0,4}\b|/(?:1[6-9]|2\d|3[0-2])\b")
_IPV6 = re.compile(
    rb"(?<![\w:.])([23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,40}(?<!:)|[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]*::)(?![\w:])"
)

# -- telephones --------------------------------------------------------------------------------------------

_COUNTRY_CODES = frozenset(
    b"1 7 20 27 30 31 32 33 34 36 39 40 41 43 44 45 46 47 48 49 51 52 53 54 55 56 57 58 60 61 62 63 64 65 66 "
    b"81 82 84 86 90 91 92 93 94 95 98 211 212 213 216 218 220 221 222 223 224 225 226 227 228 229 230 231 "
    b"232 233 234 235 236 237 238 239 240 241 242 243 244 245 246 247 248 249 250 251 252 253 254 255 256 "
    b"257 258 260 261 262 263 264 265 266 267 268 269 290 291 297 298 299 350 351 352 353 354 355 356 357 "
    b"358 359 370 371 372 373 374 375 376 377 378 380 381 382 383 385 386 387 389 420 421 423 500 501 502 "
    b"503 504 505 506 507 508 509 590 591 592 593 594 595 596 597 598 599 670 672 673 674 675 676 677 678 "
    b"679 680 681 682 683 685 686 687 688 689 690 691 692 850 852 853 855 856 880 886 960 961 962 963 964 "
    b"965 966 967 968 970 971 972 973 974 975 976 977 979 992 993 994 995 996 998".split()
)
_END_OF_NUMBER = rb"(?![\w%$+]|[.,:/-]\d|-\w|\s?[=*<])"
_INTERNATIONAL = re.compile(
    rb"(?<![\w.+*/=~-])\+(?!\d+\.\d+(?![.\d]))"
    rb"(\d{10,15}|\d{1,4}(?:[ .-]?\(\d{1,5}\))?(?:[ .-]\d)?(?:[ .-]\d{2,9}){1,6}|"
    rb"\d{1,3}[ .-]?\(\d{1,5}\)[ .-]?\d{3,9})" + _END_OF_NUMBER
)
_NORTH_AMERICAN = re.compile(
    rb"(?<![\w.+*/=)-])(?<!\d )(?:1[ .-])?(?:\([2-9]\d\d\) ?\d{3}[-. ]\d{4}|"
    rb"[2-9]\d\d([-.])[2-9]\d\d\1\d{4})" + _END_OF_NUMBER
)
_NATIONAL = re.compile(rb"(?<![\w.+*/=-])\(?0\d{1,5}\)?(?:[ ./-]{1,3}\d{2,8}){1,5}" + _END_OF_NUMBER)
_TELEPHONE_BEFORE = re.compile(
    rb"(?:\b(?:tele)?(?:ph|f)one?n?(?: *(?:number|no\.?|nummer))?|\btel|\btelefoon|\bmobile?|\bhandy|\bfax|"
    rb"\bcall|\bcell|t\xc3\xa9l(?:\xc3\xa9phone)?)[.:]{0,2}\s{0,3}[:(]?\s?\Z",
    re.IGNORECASE,
)

# -- keys --------------------------------------------------------------------------------------------------

_API_KEY = re.compile(
    rb"(?<![A-Za-z0-9_-])(?:"
    rb"(?:AKIA|ASIA)[A-Z0-9]{16}"  # AWS access key id
    rb"|gh[opsru]_[A-Za-z0-9]{36,251}|github_pat_[A-Za-z0-9_]{40,244}"  # GitHub
    rb"|glpat-[A-Za-z0-9_-]{20,64}"  # GitLab
    rb"|xox[abeoprs]-[A-Za-z0-9-]{20,250}|xapp-\d-[A-Za-z0-9-]{20,250}"  # Slack
    rb"|AIza[A-Za-z0-9_-]{35}"  # Google
    rb"|sk-(?:proj|svcacct|admin|ant|or|None)-[A-Za-z0-9_-]{20,250}|sk-[A-Za-z0-9]{32,64}"  # OpenAI and kin
    rb"|[sr]k_(?:live|test)_[A-Za-z0-9]{20,250}|whsec_[A-Za-z0-9]{32,64}"  # Stripe
    rb"|hf_[A-Za-z0-9]{30,64}"  # Hugging Face
    rb"|npm_[A-Za-z0-9]{36}|pypi-AgE[A-Za-z0-9_-]{50,500}"
    rb"|SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}"  # SendGrid
    rb"|eyJ[A-Za-z0-9_-]{10,1000}\.eyJ[A-Za-z0-9_-]{10,2000}\.[A-Za-z0-9_-]{20,1000}"  # JSON web token
    rb")(?![A-Za-z0-9_-])"
)
_ASSIGNMENT = re.compile(
    rb"(?:api|auth|access|secret|private|client|account|encryption|signing)[_-]?(?:key|token|secret)|secret|"
    rb"passw(?:or)?d|passphrase|credentials?",
    re.IGNORECASE,
)
_ASSIGNED_NAME = re.compile(rb"[A-Za-z0-9_-]{1,64}[\"']?\s?\Z")
_ASSIGNED_VALUE = re.compile(rb"[:=]>?\s?([\"']?)([A-Za-z0-9+/_=-]{20,200})(?(1)\1)(?![\w./(\[+-])")
_LEAST_ENTROPY = 3.5
_PEM = re.compile(
    rb"-----BEGIN ([A-Z0-9 ]{0,24}PRIVATE KEY(?: BLOCK)?)-----"
    rb"(?:(?=(?:(?!-----)[\x00-\xff]){32,30000}-----END \1)(?=(?:(?!-----)[\x00-\xff])*?[A-Za-z0-9+/=]{24})"
    rb"(?:(?!-----)[\x00-\xff])+-----END \1-----"
    rb"|(?:(?:\s|\\[nr]|[\"'+,])*[A-Za-z0-9+/=]{24,})+)"
)


def _ip_address(around: bytes, anchor: int) -> tuple[int, int] | None:
    match = _IPV4.match(around, anchor)
    if match:
        numbers = [int(part) for part in match[1].split(b".")]
        if max(numbers) > 255 or _VERSION_BEFORE.search(around, 0, anchor):
            return None
        address = ipaddress.IPv4Address(bytes(numbers))
        if any(address in block for block in _NOT_PUBLIC_4):
            return None
        # Of addresses drawn by chance 98 % have a number of three digits; of versions and sections few do.
        is_likely = max(numbers) >= 100 or _ADDRESS_BEFORE.search(around, 0, anchor)
        return match.span(1) if is_likely or _ADDRESS_AFTER.match(around, match.end()) else None
    match = _IPV6.match(around, anchor)
    if match:
        try:
            address6 = ipaddress.IPv6Address(match[1].decode())
        except ValueError:
            return None
        if address6 not in _PUBLIC_6 or any(address6 in block for block in _NOT_PUBLIC_6):
            return None
        return match.span(1)
    return None


def _phone(around: bytes, anchor: int) -> tuple[int, int] | None:
    if around[anchor] == 43:
        match = _INTERNATIONAL.match(around, anchor)
        if match is None:
            return None
        digits = re.sub(rb"\D", b"", match[1])
        is_assigned = any(digits[:size] in _COUNTRY_CODES for size in (1, 2, 3))
        return match.span() if is_assigned and 8 <= len(digits) <= 15 else None
    match = _NORTH_AMERICAN.match(around, anchor)
    if match:
        return match.span()
    match = _NATIONAL.match(around, anchor)
    if match and _TELEPHONE_BEFORE.search(around, max(0, anchor - 40), anchor):
        return match.span() if 8 <= len(re.sub(rb"\D", b"", match[0])) <= 13 else None
    return None


def _api_key(around: bytes, anchor: int) -> tuple[int, int] | None:
    match = _API_KEY.match(around, anchor)
    if match is None or len(set(match[0][4:])) < 8:
        return None  # few different characters: ghp_xxxxxxxx and the like
    return match.span()


def _assigned(around: bytes, anchor: int) -> tuple[int, int] | None:
    value = _ASSIGNED_VALUE.match(around, anchor)
    name = _ASSIGNED_NAME.search(around, max(0, anchor - 67), anchor)
    if value is None or name is None or not _ASSIGNMENT.search(name[0]):
        return None
    secret = value[2]
    if not re.search(rb"\d", secret) or not re.search(rb"[A-Za-z]", secret):
        return None
    shares = [count / len(secret) for count in Counter(secret).values()]
    if -sum(share * math.log2(share) for share in shares) < _LEAST_ENTROPY:
        return None
    return value.span(2)


def _private_key(around: bytes, anchor: int) -> tuple[int, int] | None:
    match = _PEM.match(around, anchor)
    return match.span() if match else None


_DECIDE = {
    IP_ADDRESS: (_ip_address, 32, 64),
    PHONE: (_phone, 48, 64),
    API_KEY: (_api_key, 8, _LONGEST_KEY),
    PRIVATE_KEY: (_private_key, 0, _LONGEST_PEM),
    _ASSIGNED: (_assigned, 80, 256),
}
"""For each kind of candidate: what decides, and how many bytes before and after the anchor it sees. (E-mail
addresses are decided in the compiled loop: there are many.)"""


def _byte_classes() -> Bytes:
    """What to look for at a byte: 0 for nothing."""
    classes = np.zeros(256, dtype=np.uint8)
    for number, characters in enumerate(
        (b"@", b"0123456789", b"+", b"(", b"_", b"-", b".", b"I", b"J", b"=:")
    ):
        for byte in characters:
            classes[byte] = number + 1
    return classes


_CLASSES = _byte_classes()


def _domain_hash(name: bytes) -> int:
    """FNV-1a of 64 bits."""
    hashed = 0xCBF29CE484222325
    for byte in name:
        hashed = (hashed ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return hashed


_DOMAINS = np.array(
    sorted(
        {_domain_hash(name) for name in _GENERIC_DOMAINS}
        | {
            _domain_hash(bytes(pair))
            for pair in itertools.product(b"abcdefghijklmnopqrstuvwxyz", repeat=2)
            if bytes(pair) not in _NO_COUNTRIES
        }
    ),
    dtype=np.uint64,
)
_HASH_START = np.uint64(0xCBF29CE484222325)
_HASH_PRIME = np.uint64(0x100000001B3)


@compiled
def _is_alphanumeric(byte: Any) -> Any:
    return 48 <= byte <= 57 or 65 <= byte <= 90 or 97 <= byte <= 122


@compiled
def _is_digit(byte: Any) -> Any:
    return 48 <= byte <= 57


@compiled
def _email_span(text: Any, begin: int, end: int, at: int, domains: Any) -> Any:
    """Start and end of the address around the @ at `at`; -1 and -1 when it is none."""
    none = (np.int64(-1), np.int64(-1))
    start: Any = np.int64(at)
    while start > begin and at - start < 64:
        byte = text[start - 1]
        if not (
            _is_alphanumeric(byte)
            or byte == 46
            or byte == 95
            or byte == 37
            or byte == 43
            or byte == 45
            or byte == 39
        ):
            break
        if byte == 46 and (start == at or text[start] == 46):
            break
        start -= 1
    while start < at and not (_is_alphanumeric(text[start]) or text[start] == 95):
        start += 1
    if start == at or text[at - 1] == 39 or text[at - 1] == 37:
        return none
    if start > begin and (text[start - 1] == 47 or _is_alphanumeric(text[start - 1])):
        return none  # a path, or longer than 64 bytes
    # The user of an address such as ssh://user@host is none.
    for place in range(start - 1, max(begin + 1, start - 128), -1):
        byte = text[place]
        if byte == 32 or byte == 10 or byte == 9 or byte == 64:
            break
        if byte == 47:
            if text[place - 1] == 47:
                return none
            break
    # Labels; the last one that is a known top-level domain ends the address.
    last: Any = np.int64(-1)
    label = at + 1
    num_labels = 0
    place = label
    while place <= end and place - at < 256:
        byte = text[place] if place < end else np.uint8(0)
        if place < end and (_is_alphanumeric(byte) or byte == 45):
            place += 1
            continue
        stop = place
        while stop > label and text[stop - 1] == 45:
            stop -= 1
        if stop == label or text[label] == 45:
            break
        num_labels += 1
        if num_labels > 1 and stop - label >= 2:
            is_coded = (
                stop - label > 4 and text[label] == 120 and text[label + 1] == 110 and text[label + 2] == 45
            )
            hashed = _HASH_START
            for letter in range(label, stop):
                hashed = (hashed ^ np.uint64(text[letter] | 32)) * _HASH_PRIME
            slot = np.searchsorted(domains, hashed)
            if is_coded or (slot < len(domains) and domains[slot] == hashed):
                last = stop
        if byte != 46 or stop < place:
            break
        label = place + 1
        place = label
    if last < 0:
        return none
    after = text[last] if last < end else np.uint8(32)
    if after == 95 or after == 64 or _is_alphanumeric(after):
        return none
    is_git = at - start == 3 and text[start] == 103 and text[start + 1] == 105 and text[start + 2] == 116
    if is_git and (after == 58 or after == 47):
        return none
    return start, last


_KEY_HEADS = (
    (5, 2, b"hf_"), (5, 2, b"sk_live_"), (5, 2, b"sk_test_"), (5, 2, b"rk_live_"), (5, 2, b"rk_test_"),
    (5, 3, b"ghp_"), (5, 3, b"gho_"), (5, 3, b"ghr_"), (5, 3, b"ghs_"), (5, 3, b"ghu_"), (5, 3, b"npm_"),
    (5, 5, b"whsec_"), (5, 6, b"github_pat_"),
    (6, 2, b"sk-"), (6, 4, b"pypi-AgE"), (6, 4, b"xapp-"), (6, 4, b"xoxa-"), (6, 4, b"xoxb-"),
    (6, 4, b"xoxe-"), (6, 4, b"xoxo-"), (6, 4, b"xoxp-"), (6, 4, b"xoxr-"), (6, 4, b"xoxs-"),
    (6, 5, b"glpat-"),
    (7, 2, b"SG."),
    (8, 1, b"AIza"), (8, 2, b"AKIA"), (8, 2, b"ASIA"),
    (9, 2, b"eyJ"),
)  # fmt: skip
"""How keys begin, by class of a telling byte (`_byte_classes`): that, where it stands, and the beginning."""
_HEADS = np.array([list(head.ljust(12, b"\0")) for _, _, head in _KEY_HEADS], dtype=np.uint8)
_HEAD_SIZES = np.array([len(head) for _, _, head in _KEY_HEADS], dtype=np.int64)
_HEAD_PLACES = np.array([place for _, place, _ in _KEY_HEADS], dtype=np.int64)
_FIRST_HEADS = np.searchsorted([kind for kind, _, _ in _KEY_HEADS], np.arange(12))
"""First row of each class."""


@compiled
def _key_start(text: Any, begin: int, end: int, at: int, kind_of_byte: Any) -> int:
    """Where a key begins that has its telling byte at `at`; -1 if there is none."""
    before = text[at - 1] if at > begin else np.uint8(0)
    for number in range(_FIRST_HEADS[kind_of_byte], _FIRST_HEADS[kind_of_byte + 1]):
        if _HEADS[number, _HEAD_PLACES[number] - 1] != before:
            continue
        start: int = at - _HEAD_PLACES[number]
        stop = start + _HEAD_SIZES[number]
        if start < begin or stop >= end or not _is_alphanumeric(text[stop]):
            continue
        place = start
        while place < stop and text[place] == _HEADS[number, place - start]:
            place += 1
        if place < stop:
            continue
        if start > begin and (
            _is_alphanumeric(text[start - 1]) or text[start - 1] == 95 or text[start - 1] == 45
        ):
            continue
        return start
    return -1


@compiled
def _number_kinds(text: Any, at: int, end: int) -> Any:
    """Whether an address, and whether a telephone number, may begin with the digit at `at`."""
    if (text[at] == 50 or text[at] == 51) and at + 6 < end and text[at + 4] == 58:
        return True, False  # IPv6: 2001:...
    stop = at
    num_digits = 0
    num_groups = 0
    run = 0
    is_dotted = True  # groups of at most three digits with single dots between
    while stop < end and stop - at < 24:
        byte = text[stop]
        if _is_digit(byte):
            run += 1
            num_digits += 1
            if run == 1:
                num_groups += 1
            elif run > 3 and num_groups <= 4:
                is_dotted = False
        elif byte == 46 and run > 0:
            run = 0
        elif byte == 32 or byte == 45 or byte == 47 or byte == 41 or byte == 40:
            if num_groups < 4:
                is_dotted = False
            run = 0
        else:
            break
        stop += 1
    may_be_phone = num_digits >= 8 and num_groups > 1
    if may_be_phone and text[at] != 48:  # (1-)ddd-ddd-dddd; what begins with 0 is looked at in Python
        start = at + 2 if text[at] == 49 and not _is_digit(text[at + 1]) else at
        may_be_phone = start + 8 < end and (
            (_is_digit(text[start + 2]) and not _is_digit(text[start + 3]) and _is_digit(text[start + 6]))
            or text[start] == 40
        )
    return is_dotted and num_groups >= 4, may_be_phone


@compiled
def _is_assigned(text: Any, at: int, end: int) -> bool:
    """Whether a run of 20 characters of a key, digits and letters among them, follows the = or : at `at`."""
    start = at + 1
    while start < min(end, at + 4) and (
        text[start] == 32 or text[start] == 34 or text[start] == 39 or text[start] == 62
    ):
        start += 1
    if start + 20 > end or text[start] == 47:
        return False
    has_digit, has_letter = False, False
    for place in range(start, min(end, start + 200)):
        byte = text[place]
        if _is_digit(byte):
            has_digit = True
        elif _is_alphanumeric(byte):
            has_letter = True
        elif byte != 43 and byte != 47 and byte != 95 and byte != 61 and byte != 45:
            return has_digit and has_letter and place >= start + 20
    return has_digit and has_letter


@compiled
def _candidates(text: Any, offsets: Any, classes: Any, wanted: Any, domains: Any, found: Any) -> Any:
    """Places where something of a wanted kind may be, in order of bytes: document, kind, start, and end for
    what is decided already, else -1. Fills `found` and returns how many there are, also beyond its length."""
    num_found = 0
    most = len(found) - 2
    is_email, is_address, is_phone = wanted[0], wanted[1], wanted[2]
    is_key, is_block, is_assigned = wanted[3], wanted[4], wanted[5]
    for document in range(len(offsets) - 1):
        begin, end = offsets[document], offsets[document + 1]
        at = begin - 1
        while True:
            at += 1
            while at < end and classes[text[at]] == 0:
                at += 1
            if at >= end:
                break
            kind_of_byte = classes[text[at]]
            place = min(num_found, most)
            start = np.int64(-1)
            if kind_of_byte == 2:
                if at > begin and (_is_alphanumeric(text[at - 1]) or text[at - 1] == 46):
                    continue
                if is_address or is_phone:
                    may_be_address, may_be_phone = _number_kinds(text, at, end)
                    if is_address and may_be_address:
                        found[place] = document, 1, at, -1
                        num_found += 1
                        place = min(num_found, most)
                    if is_phone and may_be_phone:
                        found[place] = document, 2, at, -1
                        num_found += 1
            elif kind_of_byte == 1:
                if is_email:
                    start, stop = _email_span(text, begin, end, at, domains)
                    if start >= 0:
                        found[place] = document, 0, start, stop
                        num_found += 1
            elif kind_of_byte == 3:
                if is_phone and at + 8 < end and 49 <= text[at + 1] <= 57:
                    found[place] = document, 2, at, -1
                    num_found += 1
            elif kind_of_byte == 4:
                if is_phone and at + 8 < end and _is_digit(text[at + 1]) and _is_digit(text[at + 2]):
                    found[place] = document, 2, at, -1
                    num_found += 1
            elif kind_of_byte == 10:
                if is_assigned and _is_assigned(text, at, end):
                    found[place] = document, 5, at, -1
                    num_found += 1
            elif kind_of_byte == 6 and at + 5 < end and text[at + 1] == 45:
                if is_block and text[at + 4] == 45 and text[at + 5] == 66:  # -----B
                    found[place] = document, 4, at, -1
                    num_found += 1
            elif is_key:
                start = np.int64(_key_start(text, begin, end, at, kind_of_byte))
                if start >= 0:
                    found[place] = document, 3, start, -1
                    num_found += 1
    return num_found


@compiled
def replace_spans(text: Any, offsets: Any, spans: Any, replacements: Any, replacement_offsets: Any) -> Any:
    """Text with spans (start, end, number of the replacement), in order and apart, replaced."""
    num_bytes = len(text)
    for number in range(len(spans)):
        which = spans[number, 2]
        num_bytes += replacement_offsets[which + 1] - replacement_offsets[which]
        num_bytes -= spans[number, 1] - spans[number, 0]
    out = np.empty(num_bytes, dtype=np.uint8)
    out_offsets = np.zeros(len(offsets), dtype=np.int64)
    filled = np.int64(0)
    at = offsets[0]
    number = 0
    for document in range(len(offsets) - 1):
        end = offsets[document + 1]
        while number < len(spans) and spans[number, 0] < end:
            start = spans[number, 0]
            out[filled : filled + start - at] = text[at:start]
            filled += start - at
            which = spans[number, 2]
            first, last = replacement_offsets[which], replacement_offsets[which + 1]
            out[filled : filled + last - first] = replacements[first:last]
            filled += last - first
            at = spans[number, 1]
            number += 1
        out[filled : filled + end - at] = text[at:end]
        filled += end - at
        at = end
        out_offsets[document + 1] = filled
    return out[:filled], out_offsets


def find(text: Bytes, offsets: Offsets, cfg: PiiConfig) -> npt.NDArray[np.int64]:
    """Spans to replace: rows of start, end, kind, in order of bytes, none touching another's bytes. Of two
    that overlap the one that begins first stays."""
    wanted = np.array([*(one is not None for one in cfg.placeholders()), cfg.assigned_secrets])
    found = np.empty((1024, 4), dtype=np.int64)
    num_found = _candidates(text, offsets, _CLASSES, wanted, _DOMAINS, found)
    if num_found > len(found) - 2:
        found = np.empty((num_found + 2, 4), dtype=np.int64)
        _candidates(text, offsets, _CLASSES, wanted, _DOMAINS, found)
    found = found[:num_found]
    is_decided = found[:, 3] >= 0
    spans: list[tuple[int, int, int]] = []
    for document, kind, anchor, _ in found[~is_decided].tolist():
        decide, num_before, num_after = _DECIDE[kind]
        first = max(int(offsets[document]), anchor - num_before)
        around = text[first : min(int(offsets[document + 1]), anchor + num_after)].tobytes()
        span = decide(around, anchor - first)
        if span is not None:
            spans.append((first + span[0], first + span[1], API_KEY if kind == _ASSIGNED else kind))
    both = np.concatenate([found[is_decided][:, [2, 3, 1]], np.array(spans, dtype=np.int64).reshape(-1, 3)])
    both = both[np.lexsort((both[:, 2], -both[:, 1], both[:, 0]))]
    kept: npt.NDArray[np.int64] = both[_apart(both)]
    return kept


@compiled
def _apart(spans: Any) -> Any:
    """Which spans, in order of their starts, to keep so that none overlaps."""
    is_kept = np.zeros(len(spans), dtype=np.bool_)
    last = np.int64(-1)
    for number in range(len(spans)):
        if spans[number, 0] >= last:
            is_kept[number] = True
            last = spans[number, 1]
    return is_kept


def mask(
    text: Bytes, offsets: Offsets, cfg: PiiConfig
) -> tuple[Bytes, Offsets, npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Replace personal data by placeholders. Doing so twice changes nothing more.

    Returns:
        text, offsets, whether each document changed, and int64 [documents, len(PII_KINDS)] of how many of
        each kind were replaced.
    """
    num_documents = len(offsets) - 1
    counts = np.zeros((num_documents, len(PII_KINDS)), dtype=np.int64)
    if not cfg.is_on:
        return text, offsets, np.zeros(num_documents, dtype=np.bool_), counts
    placeholders = [(one or "").encode() for one in cfg.placeholders()]
    replacements = np.frombuffer(b"".join(placeholders), dtype=np.uint8)
    replacement_offsets = np.cumsum([0, *map(len, placeholders)])
    spans = find(text, offsets, cfg)
    while len(spans):
        documents = np.searchsorted(offsets, spans[:, 0], side="right") - 1
        np.add.at(counts, (documents, spans[:, 2]), 1)
        text, offsets = replace_spans(text, offsets, spans, replacements, replacement_offsets)
        # What stood against a found one may itself be one now: look again where something was found.
        again = np.unique(documents)
        part, part_offsets = _documents(text, offsets, again)
        spans = find(part, part_offsets, cfg)
        if len(spans):
            within = np.searchsorted(part_offsets, spans[:, 0], side="right") - 1
            spans[:, :2] += (offsets[again[within]] - part_offsets[within])[:, None]
    return text, offsets, counts.sum(axis=1) > 0, counts


def _documents(text: Bytes, offsets: Offsets, documents: npt.NDArray[np.int64]) -> tuple[Bytes, Offsets]:
    """The documents named, in a batch of their own."""
    parts = [text[offsets[document] : offsets[document + 1]] for document in documents.tolist()]
    return np.concatenate(parts), np.cumsum([0, *map(len, parts)])
