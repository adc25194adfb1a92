"""The interpreter of pickles: plain data comes out as `pickle` reads it, and what is made to harm is refused before it does."""

import io
import pickle
import struct
import time

import numpy as np
import pytest

from deq_flax.untrusted.pickles import MAX_INSTRUCTIONS, Named, NameRefusedError, PickleError, unpickle


def read(data, table=None, **options):
    return unpickle(io.BytesIO(data), table or {}, **options)


PLAIN = {
    "numbers": [0, 1, -1, 255, 1 << 40, -(1 << 200), True, False, None, 1.5, float("inf")],
    "text": ["", "a", "é", "\N{GREEK SMALL LETTER ALPHA}" * 300],
    ("a", 1): (1, (2, (3, ())), [], {}),
    7: {"deep": [[[{}]]]},
}


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_is_read_as_pickle_reads_it(protocol):
    for value in (PLAIN, [], (), 3, "x", [PLAIN, PLAIN]):
        assert read(pickle.dumps(value, protocol=protocol), encoding="utf-8") == value
    if protocol >= 3:
        assert read(pickle.dumps([b"", b"a" * 300], protocol=protocol)) == [b"", b"a" * 300]


def test_several_pickles_follow_each_other():
    stream = io.BytesIO(pickle.dumps([1]) + pickle.dumps("b") + b"rest")
    assert unpickle(stream, {}) == [1] and unpickle(stream, {}) == "b" and stream.read() == b"rest"


def test_names_come_from_the_table_and_from_nowhere_else():
    assert read(b"cm\nf\n(K\x02tR.", {("m", "f"): lambda x: x + 1}) == 3
    assert read(b"cm\nn\n.", {("m", "n"): 5}) == Named(5)
    for data, name in (
        (b"cos\nsystem\n.", "os.system"),
        (b"(ios\nsystem\n.", "os.system"),
        (b"\x8c\x02os\x8c\x04exec\x93.", "os.exec"),
    ):
        with pytest.raises(NameRefusedError, match=name):
            read(data, {("m", "f"): len})


DEEP = b"K\x01" + b"\x85" * 100_000
LAUGHS = b"K\x01q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))


@pytest.mark.parametrize(
    "data",
    [
        b"}" + DEEP + b"Ns.",
        b"}" + LAUGHS + b"Ns.",
        b"}]Ns.",
        b"}]q\x01h\x01\x85h\x01Ns.",
        b"}\x8b" + struct.pack("<i", 5000) + b"\x7f" * 5000 + b"Ns.",
        b"N" * (MAX_INSTRUCTIONS + 2) + b".",
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b".",
        b"}r\xff\xff\xff\x7f.",
        b"X\x10\x27\x00\x00" + b"a" * 10_000 + b"q\x00" + b"cm\nf\nh\x00\x85R" * 100 + b".",
        b"K\x01Q.",
        b"K\x01}b.",
        b"K\x01)R.",
        b"}}.",
        b"h\x07.",
        b"\x85.",
        b"e.",
        b"(K\x01d.",
        b"",
        b"}",
    ],
)
def test_what_could_harm_is_refused_in_bounded_time(data):
    start = time.process_time()
    with pytest.raises(PickleError) as caught:
        read(data, {("m", "f"): list})
    assert len(str(caught.value)) < 300 and time.process_time() - start < 8


def test_deep_values_are_harmless_and_their_end_too():
    for opening, closing in ((b"", b"\x85"), (b"]", b"a"), (b"}K\x01", b"s")):
        value = read(opening * 100_000 + b"N" + closing * 100_000 + b".")
        assert isinstance(value, tuple | list | dict)
        del value


def test_any_bytes_give_a_value_or_a_pickle_error():
    whole, random = pickle.dumps(PLAIN, protocol=2), np.random.default_rng(0)
    for _ in range(500):
        data = bytearray(whole)
        for place in random.integers(len(data), size=3):
            data[place] = random.integers(256)
        try:
            read(bytes(data), encoding="utf-8")
        except PickleError as error:
            assert "\n" not in str(error)
