"""Names that are not UTF-8."""

import pytest

from quickbloom.common.errors import DataError
from quickbloom.common.files import check_name, is_text, shown


@pytest.mark.parametrize(("name", "text"), [("d\udce9p", False), ("dép", True), ("", True)])
def test_names_that_are_not_utf8_are_shown_and_refused(name: str, text: bool) -> None:
    assert is_text(name) is text
    if text:
        check_name("the folder", name)
        assert shown(name) == name
    else:
        with pytest.raises(DataError, match=r"^the folder 'd\\xe9p' has a name that is not UTF-8: rename it"):
            check_name("the folder", name, DataError)
