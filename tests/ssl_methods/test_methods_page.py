import pytest

from ssl_methods import plugins
from tests.ssl_methods.method_costs import PACKAGE, Pass, count_flops, count_passes
from tests.ssl_methods.methods_page import PAGE, describe, page, views_text, written_flops


def test_page_of_the_methods_is_current() -> None:
    flops = written_flops(PAGE.read_text())
    assert sorted(flops) == sorted(plugins.names(PACKAGE)), "run scripts/methods_page"
    assert PAGE.read_text() == page(flops), "a docstring or a method changed; run scripts/methods_page"


def test_operations_on_the_page_are_those_of_the_code() -> None:
    # The two cheapest to count; all of them take half a minute.
    flops = written_flops(PAGE.read_text())
    for name in ("supervised", "moco"):
        assert flops[name] == round(count_flops(name) / 1e9, 1), "run scripts/methods_page"


def test_supervised_step_is_three_forward_passes_of_a_resnet_50() -> None:
    # He et al. 2016 count 3.8e9 multiplications with addition; torchvision's variant has its stride in the 3 x 3: 4.1.
    # The first layer has no gradient with respect to its input.
    assert count_flops("supervised") == pytest.approx(3 * 2 * 4.09e9, rel=0.02)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("barlow_twins", "2"),
        ("moco", "1"),
        ("supervised", "1"),
        ("dino", "2 + 8 x 0.18 = 3.47"),
        ("swav", "2 + 6 x 0.18 = 3.10"),
    ],
)
def test_passes_with_gradient_are_counted_by_their_pixels(name: str, text: str) -> None:
    assert views_text(count_passes(name)) == text


def test_sizes_that_change_with_the_step_are_averaged() -> None:
    (drawn,) = count_passes("triplet")
    assert drawn.views == 2
    # Sides even from 96 to 224: the mean square of 3/7 to 1 is 0.537, 32 draws are within 0.1 of it.
    assert drawn.area == pytest.approx(0.537, abs=0.1)


def test_docstring_without_a_heading_is_refused() -> None:
    class Bare:
        """Do nothing.

        Args:
            backbone: network.

        Source: none.
        """

    with pytest.raises(ValueError, match="Bare: no Differs in its docstring"):
        describe(Bare)


def test_docstring_is_taken_apart() -> None:
    class Full:
        """Do a thing
        well.

        More of it.

        Args:
            backbone: network.
            one, two: numbers of
                things.

        Differs:
            - in this,
              a little
            - in that

        Source: A 2020, arXiv:1.
        """

    found = describe(Full)
    assert found.text == ("Do a thing well.", "More of it.")
    assert found.knobs == {"one": "numbers of things.", "two": "numbers of things."}
    assert found.differs == ("in this, a little", "in that")
    assert found.source == "A 2020, arXiv:1."


def test_view_of_whole_size_is_written_without_its_area() -> None:
    assert views_text([Pass(1, 1.0)]) == "1"
    assert views_text([Pass(2, 0.25)]) == "2 x 0.25 = 0.50"
