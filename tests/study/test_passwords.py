from study.passwords import hide_password


def test_passwords_are_not_passed_on() -> None:
    url = "--storage postgresql+psycopg://me:p@ss:w/rd@host:5432/db --name x"
    assert hide_password(url) == "--storage postgresql+psycopg://me:***@host:5432/db --name x"
    assert hide_password("sqlite:///studies.db a@b") == "sqlite:///studies.db a@b"
