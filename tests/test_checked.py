"""The reader of JSON: what is right comes through, what is wrong is named with its place."""

import pytest

from heterolora.checked import Fields


class Wrong(Exception):
    pass


def fields(**values):
    return Fields(values, "f.json", Wrong)


def test_values_that_fit_come_through(tmp_path):
    path = tmp_path / "f.json"
    path.write_text(
        '{"n": 3, "x": 0.5, "s": "a", "f": true, "o": null, "l": [1, 2], "d": {"q.k": 4}}'
    )
    found = Fields.load(path, Wrong)
    assert (found.integer("n"), found.number("x"), found.number("n")) == (3, 0.5, 3.0)
    assert (found.text("s"), found.choice("s", ("a", "b")), found.flag("f")) == ("a", "a", True)
    assert found.optional("o", Fields.integer) is None
    assert found.optional("absent", Fields.integer) is None
    assert found.optional("n", Fields.integer, high=3) == 3
    assert found.entries("l", Fields.integer) == [1, 2]
    assert found.each("d", Fields.integer, low=4) == {"q.k": 4}
    found.keys("n", "x", "s", "f", "o", optional=("l", "d", "e"))


@pytest.mark.parametrize(
    ("values", "take", "message"),
    [
        ({}, lambda f: f.integer("n"), "f.json: n is missing"),
        ({"n": True}, lambda f: f.integer("n"), "f.json: n must be a whole number, not True"),
        ({"n": 1.0}, lambda f: f.integer("n"), "f.json: n must be a whole number, not 1.0"),
        ({"n": 9}, lambda f: f.integer("n", 1, 8), "f.json: n is 9; it must be from 1 to 8"),
        ({"n": -1}, lambda f: f.integer("n"), "f.json: n is -1; it must be at least 0"),
        ({"x": False}, lambda f: f.number("x"), "f.json: x must be a number, not False"),
        ({"x": 0}, lambda f: f.number("x", positive=True), "f.json: x is 0; it must be above 0"),
        (
            {"x": 2},
            lambda f: f.number("x", high=1),
            "f.json: x is 2; it must be at least 0 and at most 1",
        ),
        ({"x": float("inf")}, lambda f: f.number("x"), "f.json: x is inf; it must be at least 0"),
        (
            {"x": 10**400},
            lambda f: f.number("x"),
            f"f.json: x is 1{'0' * 79}; it must be at least 0",
        ),
        ({"s": ""}, lambda f: f.text("s"), "f.json: s must be a non-empty string, not ''"),
        ({"s": "c"}, lambda f: f.choice("s", ("a", "b")), "f.json: s is 'c', none of a, b"),
        ({"s": []}, lambda f: f.choice("s", ("a",)), "f.json: s is a list, none of a"),
        ({"f": 1}, lambda f: f.flag("f"), "f.json: f must be true or false, not 1"),
        ({"d": [1]}, lambda f: f.fields("d"), "f.json: d must be a JSON object, not a list"),
        (
            {"l": {}},
            lambda f: f.entries("l", Fields.text),
            "f.json: l must be a list, not an object",
        ),
        (
            {"l": [{"n": 1}, {}]},
            lambda f: [g.integer("n") for g in f.entries("l", Fields.fields)],
            "f.json: l[1].n is missing",
        ),
        (
            {"d": {"q.k": {"n": "1"}}},
            lambda f: [g.integer("n") for g in f.each("d", Fields.fields).values()],
            "f.json: d['q.k'].n must be a whole number, not '1'",
        ),
        (
            {"n": 1, "m": 2},
            lambda f: f.keys("n"),
            "f.json: m is not a key that is known here; known are n",
        ),
        ({}, lambda f: f.keys("n"), "f.json: n is missing"),
        (
            {"schema_version": 3},
            lambda f: f.version(2),
            "f.json: schema_version is 3, and this heterolora reads up to 2; upgrade it",
        ),
    ],
)
def test_what_is_wrong_is_named(values, take, message):
    with pytest.raises(Wrong) as caught:
        take(fields(**values))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must be a JSON object, not a list"),
        ("{", "not valid JSON"),
        ('{"x": NaN}', "f.json: x is nan, which is not a finite number"),
        ('{"d": {"q": [1, 1e999]}}', r"f.json: d.q\[1\] is inf, which is not a finite number"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_what_is_no_object_is_refused(tmp_path, text, message):
    path = tmp_path / "f.json"
    path.write_text(text)
    with pytest.raises(Wrong, match=message):
        Fields.load(path, Wrong)


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path):
    with pytest.raises(Wrong, match="no such file"):
        Fields.load(tmp_path / "f.json", Wrong)
    (tmp_path / "g.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Wrong, match="cannot be read"):
        Fields.load(tmp_path / "g.json", Wrong)
