"""Personal data: what is found and what is not, case by case, and what masking keeps."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_batch import text_batch

from llmtrain.data.content.config import PII_KINDS, PiiConfig
from llmtrain.data.content.pii import find, mask

ALL = PiiConfig(
    email="<EMAIL>",
    ip_address="<IP_ADDRESS>",
    phone="<PHONE>",
    api_key="<API_KEY>",
    private_key="<PRIVATE_KEY>",
    assigned_secrets=True,
)
KEY_LINES = "MIIEpAIBAAKCAQEA0123456789abcdefghijABCDEFGHIJ+/\n" * 4
ALNUM = "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"


def masked(text: str, cfg: PiiConfig = ALL) -> str:
    return mask(*text_batch([text]), cfg)[0].tobytes().decode()


FOUND = {
    # e-mail
    "write to jane.doe@example.co.uk, please": "write to <EMAIL>, please",
    "mailto:Jane_Doe+list@sub.example.COM": "mailto:<EMAIL>",
    "<jane@example.org>.": "<<EMAIL>>.",
    "email=jane@example.org;x": "email=<EMAIL>;x",
    "a@example.com,b@example.de": "<EMAIL>,<EMAIL>",
    "邮箱jane@example.cn。": "邮箱<EMAIL>。",
    "jane@example.com.Then": "<EMAIL>.Then",
    "at jane@example.com.": "at <EMAIL>.",
    "x@xn--bcher-kva.xn--p1ai": "<EMAIL>",
    "'o.brien@example.ie'": "'<EMAIL>'",
    # addresses
    "from 52.95.110.1 port 22": "from <IP_ADDRESS> port 22",
    "http://151.101.1.69:8080/x": "http://<IP_ADDRESS>:8080/x",
    "server 8.8.8.8": "server <IP_ADDRESS>",
    "1.2.3.4/24": "<IP_ADDRESS>/24",
    "dns 2001:4860:4860::8888.": "dns <IP_ADDRESS>.",
    "[2a00:1450:4001:082a:0000:0000:0000:200e]:443": "[<IP_ADDRESS>]:443",
    # telephones
    "call +1 (212) 555-0123 now": "call <PHONE> now",
    "+49 30 901820": "<PHONE>",
    "+442071838750,": "<PHONE>,",
    "Fon: +33 1 42 68 53 00": "Fon: <PHONE>",
    "(555) 123-4567": "<PHONE>",
    "212-555-0123 or 1-800-292-9263": "<PHONE> or <PHONE>",
    "212.555.0123": "<PHONE>",
    "Tel.: 030 90182012": "Tel.: <PHONE>",
    "phone 020 7183 8750": "phone <PHONE>",
    # keys
    "AKIAIOSFODNN7EXAMPLE": "<API_KEY>",
    f"token ghp_{ALNUM}.": "token <API_KEY>.",
    f"github_pat_{ALNUM}{ALNUM}": "<API_KEY>",
    f"glpat-{ALNUM[:20]}": "<API_KEY>",
    f"xoxb-1234567890-{ALNUM}": "<API_KEY>",
    f"AIza{ALNUM[:35]}": "<API_KEY>",
    f"sk-proj-{ALNUM}": "<API_KEY>",
    f"sk-ant-api03-{ALNUM}": "<API_KEY>",
    f"sk-{ALNUM}{ALNUM[:12]}": "<API_KEY>",
    f'"sk_live_{ALNUM}"': '"<API_KEY>"',
    f"hf_{ALNUM[:34]}": "<API_KEY>",
    f"npm_{ALNUM}": "<API_KEY>",
    f"pypi-AgEIcHlwaS5vcmc{ALNUM}{ALNUM}": "<API_KEY>",
    f"SG.{ALNUM[:22]}.{(ALNUM + ALNUM)[:43]}": "<API_KEY>",
    f"Bearer {JWT}": "Bearer <API_KEY>",
    "password = 'aB3dE5gH7jK9mN1pQ3rS'": "password = '<API_KEY>'",
    'api_key: "0f8e7d6c5b4a39281706f5e4d3c2b1a0"': 'api_key: "<API_KEY>"',
    # private keys
    f"a\n-----BEGIN RSA PRIVATE KEY-----\n{KEY_LINES}-----END RSA PRIVATE KEY-----\nb": "a\n<PRIVATE_KEY>\nb",
    f"-----BEGIN PRIVATE KEY-----\n{KEY_LINES}\n\nThe key was cut.": "<PRIVATE_KEY>\n\n\nThe key was cut.",
    '"-----BEGIN EC PRIVATE KEY-----\\n' + KEY_LINES.replace("\n", "\\n") + '-----END EC PRIVATE KEY-----"':
        '"<PRIVATE_KEY>"',
}  # fmt: skip

LEFT = [
    # e-mail
    "git@github.com:llm/train.git",
    "ssh://jane@example.com/x",
    "https://user:word@example.com/",
    "icon@2x.png a@b.T w@x.mean user@host @decorator.name",
    "package@1.2.3 foo@ bar.com @example.com",
    "jane@example_com.org_x",
    "path/jane@example.com",
    # addresses
    "version 10.20.130.40 v1.22.133.44 >=2.31.144.0",
    "10.1.200.3 192.168.0.1 172.16.200.1 127.0.0.1 169.254.200.1 100.64.3.200 224.0.0.251 255.255.255.0",
    "192.0.2.146 198.51.100.7 203.0.113.200",
    "Section 4.2.13.1 and 12.2.2.2, OID 1.3.6.1.4.1.311",
    "1.2.3.4 8.8.8.8 3.36.10.0 2.6.18.6",
    "update V8 to 9.5.172.19, upgraded foo to 3.1.200.2, linux 2.6.180.1, 2.6.8.1/9",
    "pkg-1.22.133.4.tar.gz 1.22.133.4-beta 300.1.200.1 1.02.200.3 1.2.200",
    "std::vector a::b ::1 fe80::1 2001:db8::1 fd00::2 12:30:45 2001:0:1::2",
    # telephones
    "2024-01-02 10:20:30 978-0-306-40615-7 3.14159265358979 1234567890",
    "123e4567-e89b-12d3-a456-426614174000 555-123-4567",
    "+12 +1234567 x+12345678901 1+4915112345678 +1.234567890",
    "192-168-0001 123.456.7890 100 200 3000",
    "-212-555-0123-9 212-555-01234 $212-555-0123%",
    "030 90182012 is a number",
    "(1:10~+20191229111838+6991d5728f1)",
    # keys
    "ghp_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx AKIA AKIAXXXXXXXXXXXXXXXX",
    f"task_sk-{ALNUM}{ALNUM[:12]}",
    "hf_hub_download sk-learn sk_buff npm_config_registry eyJ SG.x",
    "secret: my-very-long-name-of-some-thing-here",
    "commit: 0f8e7d6c5b4a39281706f5e4d3c2b1a0",
    "token = get_secret_token_of(user_number_1)",
    # private keys
    "-----BEGIN PRIVATE KEY-----\n...\n-----END PRIVATE KEY-----",
    f"-----BEGIN CERTIFICATE-----\n{KEY_LINES}-----END CERTIFICATE-----",
    f"-----BEGIN PUBLIC KEY-----\n{KEY_LINES}-----END PUBLIC KEY-----",
    "It begins with -----BEGIN RSA PRIVATE KEY----- and then the key.",
]


@pytest.mark.parametrize(("text", "wanted"), FOUND.items())
def test_personal_data_is_replaced(text: str, wanted: str) -> None:
    assert masked(text) == wanted


@pytest.mark.parametrize("text", LEFT)
def test_what_only_looks_like_it_stays(text: str) -> None:
    assert masked(text) == text


def test_each_kind_is_counted_by_document(batch_of: Any) -> None:
    texts = [
        "a@example.com b@example.com +49 30 901820",
        "nothing here",
        "",
        "AKIAIOSFODNN7EXAMPLE 52.95.110.1",
    ]
    text, offsets, is_changed, counts = mask(*batch_of(texts), ALL)
    assert counts.tolist() == [[2, 0, 1, 0, 0], [0] * 5, [0] * 5, [0, 1, 0, 1, 0]]
    assert is_changed.tolist() == [True, False, False, True]
    assert [text[offsets[at] : offsets[at + 1]].tobytes().decode() for at in range(4)] == [
        "<EMAIL> <EMAIL> <PHONE>", "nothing here", "", "<API_KEY> <IP_ADDRESS>"
    ]  # fmt: skip


@pytest.mark.parametrize("kind", PII_KINDS)
def test_a_kind_that_is_off_stays(kind: str, batch_of: Any) -> None:
    texts = list(FOUND)
    cfg = PiiConfig(**{name: None if name == kind else f"<{name}>" for name in PII_KINDS})
    counts = mask(*batch_of(texts), cfg)[3].sum(axis=0)
    assert [count > 0 for count in counts] == [name != kind for name in PII_KINDS]


def test_with_everything_off_the_batch_itself_comes_back(batch_of: Any) -> None:
    text, offsets = batch_of(list(FOUND))
    found = mask(text, offsets, PiiConfig())
    assert found[0] is text
    assert found[1] is offsets
    assert not found[2].any()


def test_assigned_secrets_stay_unless_asked_for() -> None:
    text = "password = 'aB3dE5gH7jK9mN1pQ3rS'"
    assert masked(text, PiiConfig(api_key="<API_KEY>")) == text


def test_nothing_is_found_across_two_documents(batch_of: Any) -> None:
    text, offsets = batch_of(
        ["jane@example.com", "jane@", "example.com", "52.95.", "110.1", "AKIAIOSFOD", "NN7EXAMPLE"]
    )
    assert find(text, offsets, ALL).tolist() == [[0, 16, 0]]


def test_many_findings_in_a_batch(batch_of: Any) -> None:
    texts = ["jane@example.com "] * 3000
    text, _, _, counts = mask(*batch_of(texts), ALL)
    assert counts.sum() == 3000
    assert text.tobytes() == b"<EMAIL> " * 3000


def test_of_two_that_overlap_the_first_stays() -> None:
    assert masked(f"api_key = sk-proj-{ALNUM}") == "api_key = <API_KEY>"
    assert mask(*text_batch([f"api_key = sk-proj-{ALNUM}"]), ALL)[3].sum() == 1


PIECES = st.sampled_from(
    [*FOUND, *LEFT, "@", ".", "+", "-", " ", "\n", "1", "52.95.110.1", "a@b.de", "+4930901820", "é", ":", "/"]
)


@settings(deadline=None)
@given(st.lists(st.lists(PIECES, max_size=5).map("".join), max_size=4))
def test_masking_again_changes_nothing(texts: list[str]) -> None:
    text, offsets, is_changed, counts = mask(*text_batch(texts), ALL)
    text.tobytes().decode()
    again = mask(text, offsets, ALL)
    assert again[0].tobytes() == text.tobytes()
    assert not again[2].any()
    assert (counts.sum(axis=1) > 0).tolist() == is_changed.tolist()
    for number, before in enumerate(texts):
        after = text[offsets[number] : offsets[number + 1]].tobytes().decode()
        assert (after != before) == bool(is_changed[number])
        assert after == masked(before)


def test_source_code_of_the_standard_library_has_next_to_no_false_alarms(batch_of: Any) -> None:
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*.py"))]
    text, offsets = batch_of(texts)
    spans = find(text, offsets, ALL)
    num_found = np.bincount(spans[:, 2], minlength=len(PII_KINDS))
    assert len(text) > 3_000_000
    assert num_found[1:].sum() <= 5, [text[start:end].tobytes() for start, end, kind in spans if kind > 0]
