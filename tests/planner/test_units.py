"""Quantities as people type them, and those that are no quantity of the kind asked for."""

import math

import pytest

from llmtrain.errors import ConfigError
from llmtrain.planner.units import (
    BYTES,
    DURATION,
    FLOPS,
    HOURS,
    LOSS,
    MONEY,
    PARAMS,
    TOKENS,
    parse_quantity,
)


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("7B", PARAMS, 7e9),
        ("7e9", PARAMS, 7e9),
        ("1_279_395_840", PARAMS, 1_279_395_840),
        ("1,279,395,840", PARAMS, 1_279_395_840),
        ("1.5T params", PARAMS, 1.5e12),
        ("300B", TOKENS, 300e9),
        ("300B tokens", TOKENS, 300e9),
        (" 300 B ", TOKENS, 300e9),
        ("1.5e21", FLOPS, 1.5e21),
        ("1.5 ZFLOPs", FLOPS, 1.5e21),
        ("2PF-days", FLOPS, 2 * 8.64e19),
        ("80GiB", BYTES, 80 * 2**30),
        ("80GB", BYTES, 80e9),
        ("14d", DURATION, 14 * 86400),
        ("1d 12h", DURATION, 36 * 3600),
        ("90 min", DURATION, 5400),
        ("20k", HOURS, 20_000),
        ("20k gpu-hours", HOURS, 20_000),
        ("$50k", MONEY, 50_000),
        ("50k usd", MONEY, 50_000),
        ("2.85", LOSS, 2.85),
        ("4 bits", LOSS, 4 * math.log(2)),
        (20000, HOURS, 20_000),
        (1e21, FLOPS, 1e21),
    ],
)
def test_what_people_type_is_read(text, kind, value):
    assert parse_quantity(text, kind, name="x") == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("7GB", TOKENS, "x=7GB: 'GB' belongs to a size in bytes, not to a number of tokens (how many tokens"),
        ("7GiB", PARAMS, "'GiB' belongs to a size in bytes, not to a number of parameters"),
        ("300B tokens", PARAMS, "'tokens' belongs to a number of tokens, not to a number of parameters"),
        ("14d", FLOPS, "'d' belongs to a duration, not to a number of FLOPs"),
        ("7b", PARAMS, "'b' is spelled 'B'"),
        ("80gib", BYTES, "'gib' is spelled 'GiB'"),
        ("$7B", PARAMS, "'$7B' is not a unit of a number of parameters"),
        ("7 furlongs", PARAMS, "'furlongs' is not a unit of a number of parameters; give a number of"),
        ("7B 300M", PARAMS, "x=7B 300M: 2 numbers; give one, as in 7B"),
        ("1,5", PARAMS, "is no number (thousands are grouped as in 1,000 or 1_000)"),
        ("1.2.3", FLOPS, "is no number"),
        ("", TOKENS, "x='' is empty; give a number of tokens, as in 300B"),
        ("-7B", PARAMS, "x=-7B must be a number of parameters above 0, as in 7B"),
        ("0", FLOPS, "x=0 must be a number of FLOPs above 0"),
        ("1e999", FLOPS, "x=1e999 must be a number of FLOPs above 0"),
        ("nan", LOSS, "'nan' is not a unit of a loss in nats per token"),
        (float("nan"), FLOPS, "x=nan must be a number of FLOPs above 0"),
        (-1, HOURS, "x=-1 must be a number of device-hours above 0, as in 20k"),
    ],
)
def test_what_is_no_such_quantity_is_refused_with_the_reason(text, kind, message):
    with pytest.raises(ConfigError) as caught:
        parse_quantity(text, kind, name="x")
    assert message in str(caught.value)


def test_zero_is_a_quantity_where_it_may_be():
    assert parse_quantity("0", TOKENS, name="inference.tokens", may_be_zero=True) == 0
    with pytest.raises(ConfigError, match=r"inference\.tokens=-1 must be a number of tokens at least 0"):
        parse_quantity("-1", TOKENS, name="inference.tokens", may_be_zero=True)
