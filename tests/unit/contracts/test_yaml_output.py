"""Strings remain strings for readers of other versions of YAML."""

import pytest
import yaml

from isthmus_contracts.manifests.yaml_output import dumped


@pytest.mark.parametrize("text", ["1e-5", "-1E6", "+.5e3", "0.1", "10", "1e400", "yes", "null", "~", ""])
def test_strings_that_look_like_other_types_are_quoted(text: str) -> None:
    written = dumped([{"a": text}])
    assert written.strip() in (f"a: '{text}'", f'a: "{text}"')
    assert yaml.safe_load(written) == {"a": text}


@pytest.mark.parametrize("text", ["abc", "1e", "e5", "1.2.3", "v1e5"])
def test_plain_words_are_not_quoted(text: str) -> None:
    assert dumped([{"a": text}]) == f"a: {text}\n"


def test_several_objects_keep_their_order() -> None:
    objects = [{"b": 1, "a": "x\ny\n"}, {"c": [True, None]}]
    assert list(yaml.safe_load_all(dumped(objects))) == objects
    assert dumped(objects).index("b:") < dumped(objects).index("a:")
