import pytest

from orchestrate.launchers.host_list import expand_hosts, expand_numbers


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("", ()),
        ("m1", ("m1",)),
        ("m[1-2]", ("m1", "m2")),
        ("gpu[08-10,12],login", ("gpu08", "gpu09", "gpu10", "gpu12", "login")),
        ("r[1-2]n[1,3].cluster", ("r1n1.cluster", "r1n3.cluster", "r2n1.cluster", "r2n3.cluster")),
        ("a, b", ("a", "b")),
    ],
)
def test_every_host_of_a_short_list_is_named(text: str, hosts: tuple[str, ...]) -> None:
    assert expand_hosts(text) == hosts


def test_numbers_keep_their_order_and_zeros() -> None:
    assert expand_numbers("3,0-2,07") == ["3", "0", "1", "2", "07"]
