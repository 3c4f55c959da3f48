"""What the pages of scores and comparisons hold: each number in its column, each answer and box of a question."""

from __future__ import annotations

import base64
import io
import re

import pytest
from PIL import Image

from pipelines.evaluation.compare import Comparison
from pipelines.evaluation.compare_page import comparison_page
from pipelines.evaluation.page import (
    OTHER_COLOUR,
    PREDICTED_COLOUR,
    TRUE_COLOUR,
    data_url,
    drawn_case,
    score_page,
    truth_text,
)


def line(key="a", *, score=1.0, benchmark="exact", **fields):
    return {
        "benchmark": benchmark, "id": key, "score": score, "blind_score": None, "image": None, "answer": "said",
        "blind": None, "shuffled": None, "instruction": f"<{key}>", "truth": {"answer": "true & so"}, "problem": "",
        "split": "test", "history": [], "choices": [],
        **fields,
    }  # fmt: skip


def score(**fields):
    return {
        "metric": "exact <match>", "value": 50.04, "low": 40.0, "high": 60.06, "n": 1234, "blind": 12.34,
        "shuffled": None, "also": {}, "parts": {}, "unanswered": 0, "problems": [], **fields,
    }  # fmt: skip


def cells(html):
    rows = re.findall("<tr>(.*?)</tr>", html)
    return [re.findall("<t[hd]>(.*?)</t[hd]>", row) for row in rows]


# ---------------------------------------------------------------------- scores


def test_the_table_has_each_number_in_its_column():
    page = score_page({"a": score(), "b<": score(unanswered=3, shuffled=1.0, blind=None)}, [], "<run>", 4)
    head, first, second = cells(page.partition('<p class="key">')[0])
    assert head == ["benchmark", "metric", "score", "95% interval", "blind", "shuffled", "questions", "unanswered"]
    numbers = ["exact &lt;match&gt;", "<b>50.0</b>", "40.0 – 60.1"]
    assert first == ['<a href="#a">a</a>', *numbers, "12.3", "", "1,234", ""]
    assert second[1:] == [*numbers, "", "1.0", "1,234", "3"] and second[0].endswith(">b&lt;</a>")
    assert '<p class="what">&lt;run&gt;</p>' in page


def test_a_section_has_the_other_numbers_the_parts_and_why_questions_have_no_answer():
    parts = {"yes<": {"value": 75.0, "low": 70.0, "high": 80.0, "n": 2000}}
    found = score(also={"mean IoU": 12.34, "x<": 1.0}, parts=parts, unanswered=2, problems=["q1: too <long>"])
    section = score_page({"a": found}, [], "x", 4).partition('<section id="a">')[2]
    assert '<ul class="also"><li>mean IoU: 12.3</li><li>x&lt;: 1.0</li></ul>' in section
    assert cells(section) == [
        ["part", "score", "95% interval", "questions"],
        ["yes&lt;", "75.0", "70.0 – 80.0", "2,000"],
    ]
    assert "<summary>2 without an answer</summary><ul><li>q1: too &lt;long&gt;</li></ul>" in section
    plain = score_page({"a": score(problems=["q1: x"])}, [], "x", 4).partition("<section")[2]
    assert "<details>" not in plain and "without an answer" not in plain


def test_each_benchmark_shows_its_own_questions():
    lines = [line("one", benchmark="a"), line("two", benchmark="b"), line("three", benchmark="b", score=0.0)]
    sections = score_page({"b": score(), "a": score()}, lines, "x", 4).split("<section ")[1:]
    assert [re.findall("&lt;(.*?)&gt;</p>", section) for section in sections] == [["three", "two"], ["one"]]
    worst, best = sections[0].split("<h3>Best</h3>")
    assert "&lt;three&gt;" in worst and "&lt;two&gt;" in best


@pytest.mark.parametrize(
    ("value", "kind"), [(1.0, "right"), (1.5, "right"), (0.99, "partly"), (0.01, "partly"), (0.0, "wrong")]
)
def test_a_question_is_shown_with_its_truth_its_answers_and_its_score(value, kind):
    case = line("q", score=value, blind="", shuffled="<s>", problem="why <not>")
    page = score_page({"exact": score()}, [case], "x", 1)
    shown = page.partition("<figure ")[2]
    assert shown.startswith(f'class="{kind}"><div class=none>no image</div><figcaption><p>&lt;q&gt;</p>')
    assert re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", shown) == [
        ("truth", "true &amp; so"),
        ("answer", "said"),
        ("blind", ""),
        ("shuffled", "&lt;s&gt;"),
        ("problem", "why &lt;not&gt;"),
        ("score", f"{value:.2f}"),
    ]
    plain = score_page({"exact": score()}, [line(answer=None)], "x", 1)
    assert re.findall("<dt>(.*?)</dt>", plain) == ["truth", "score"], "what was not asked for or failed is left out"


# ---------------------------------------------------------------------- images


@pytest.fixture
def image(tmp_path):
    """A file of 80 x 40 white pixels."""
    file = tmp_path / "a.png"
    Image.new("RGB", (80, 40), (255, 255, 255)).save(file)
    return str(file)


def extent(drawn, colour):
    """The rectangle around all pixels of a colour; None where there are none."""
    found = [(x, y) for x in range(drawn.width) for y in range(drawn.height) if drawn.getpixel((x, y)) == colour]
    if not found:
        return None
    across, down = zip(*found, strict=True)
    return min(across), min(down), max(across), max(down)


BOX = {"box": [60, 30, 20, 10], "width": 80, "height": 40}


def test_boxes_are_drawn_in_the_colour_of_whose_they_are(image):
    case = line(image=image, truth=BOX, answer="{<0><0><10><20>}")
    drawn = drawn_case(case, 80, other="{<90><80><100><90>}")
    assert extent(drawn, TRUE_COLOUR) == (20, 10, 60, 30), "corners in any order"
    assert extent(drawn, PREDICTED_COLOUR) == (0, 0, 8, 8)
    assert extent(drawn, OTHER_COLOUR) == (72, 32, 79, 36)
    over = drawn_case(line(image=image, truth=BOX, answer="{<40><40><60><60>}"), 80, other="{<40><40><60><60>}")
    assert extent(over, PREDICTED_COLOUR) == (32, 16, 48, 24) and not extent(over, OTHER_COLOUR)


def test_the_legends_name_the_colours_that_are_drawn():
    def words(colour, name):
        return f'<span style="color:#{bytes(colour).hex()}">{name} box</span>'

    own = score_page({"exact": score()}, [], "x", 1)
    both = comparison_page({"exact": compared()}, [], [], ("", ""), 1)
    assert f"{words(TRUE_COLOUR, 'Green')}: true." in own and f"{words(PREDICTED_COLOUR, 'Red')}: predicted." in own
    assert f"{words(TRUE_COLOUR, 'Green')}: true." in both and f"{words(PREDICTED_COLOUR, 'Red')}: after." in both
    assert f"{words(OTHER_COLOUR, 'Orange')}: before." in both
    assert all(page.count("<style>\n:root {") == 1 for page in (own, both)), "and each page has its style"


@pytest.mark.parametrize("answer", ["no box", "", None])
def test_an_answer_without_a_box_leaves_the_true_one_alone(image, answer):
    drawn = drawn_case(line(image=image, truth=BOX, answer=answer), 80)
    assert extent(drawn, TRUE_COLOUR) and not extent(drawn, PREDICTED_COLOUR) and not extent(drawn, OTHER_COLOUR)
    both = drawn_case(line(image=image, truth=BOX, answer=answer), 80, other="{<90><80><100><90>}")
    assert extent(both, OTHER_COLOUR) and not extent(both, PREDICTED_COLOUR)


def test_phrases_of_an_answer_are_drawn_with_their_boxes(image):
    plain = drawn_case(line(image=image), 80)
    assert plain.getcolors() == [(80 * 40, (255, 255, 255))]
    assert len(drawn_case(line(image=image, answer="<p>a cat</p> {<10><10><90><90>}"), 80).getcolors()) > 1


def test_images_are_made_so_large_and_what_cannot_be_opened_is_left_out(image, tmp_path):
    assert drawn_case(line(image=image)).size == (320, 160)
    assert drawn_case(line(image=image), 10).size == (10, 5)
    assert drawn_case(line(image=image), 1).size == (1, 1)
    (tmp_path / "b.png").write_bytes(b"no image")
    assert drawn_case(line(image=str(tmp_path / "b.png"))) is None
    page = score_page({"exact": score()}, [line(image=image)], "x", 1)
    (data,) = re.findall('src="data:image/jpeg;base64,(.*?)"', page)
    with Image.open(io.BytesIO(base64.b64decode(data))) as shown:
        assert (shown.format, shown.size) == ("JPEG", (320, 160))


def test_a_data_url_is_a_jpeg_of_the_image():
    head, _, data = data_url(Image.new("RGB", (3, 2))).partition(",")
    assert head == "data:image/jpeg;base64" and base64.b64decode(data)[:3] == b"\xff\xd8\xff"


@pytest.mark.parametrize(
    ("truth", "text"),
    [
        ({"answers": ["b", "a", "b"], "answer": "x"}, "b, a"),
        ({"answer": "x", "caption": "c"}, "x"),
        ({"caption": "c", "label": 1}, "c"),
        ({"label": 1, "box": [0, 0, 1, 1]}, "1"),
        ({"box": [0, 0, 1, 1], "phrases": ["p"]}, "the green box"),
        ({"phrases": ["p", "q"], "objects": []}, "p, q"),
        (
            {"objects": [{"shape": "star", "texture": "plain", "colour": "red", "size": "small"}] * 2},
            "small red plain star; small red plain star",
        ),
        ({"img_id": "x"}, '{"img_id": "x"}'),
    ],
)
def test_the_truth_as_text(truth, text):
    assert truth_text(truth) == text


# ---------------------------------------------------------------------- two models


def compared(**fields):
    return Comparison(
        **{
            "ours": 66.66, "theirs": 33.33, "difference": 33.33, "low": -5.0, "high": 60.0, "p": 0.01234, "better": 2,
            "worse": 1, "n": 1500, **fields,
        }
    )  # fmt: skip


def test_the_table_of_a_comparison_has_each_number_in_its_column():
    page = comparison_page({"a<": compared()}, [], [], ("new <>", "old <>"), 3)
    head, row = cells(page)
    assert head == ["benchmark", "before", "after", "difference", "95% interval", "p", "better", "worse", "questions"]
    link = '<a href="#a&lt;">a&lt;</a>'
    assert row == [link, "33.3", "<b>66.7</b>", "+33.3", "-5.0 .. +60.0", "0.0123", "2", "1", "1,500"]
    assert '<section id="a&lt;"><h2>a&lt;</h2>' in page
    assert "before: old &lt;&gt;<br>after: new &lt;&gt;" in page


def test_questions_of_both_are_shown_side_by_side_and_those_of_one_are_not():
    ours = [line("q", score=0.5), line("only ours"), line("q", benchmark="b", score=0.0, answer=None)]
    theirs = [line("q", benchmark="b", answer="b's"), line("only theirs"), line("q", score=0.25, answer="<was>")]
    page = comparison_page({"exact": compared(), "b": compared()}, ours, theirs, ("", ""), 3)
    first, second = page.split("<section ")[1:]
    assert "only" not in page and re.findall("<h3>(.*?)</h3>", first + second) == ["Better after: 1", "Worse after: 1"]
    assert 'figure class="right"><div class=none>no image</div><figcaption><p>&lt;q&gt;</p>' in first
    assert re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", first) == [
        ("truth", "true &amp; so"),
        ("before", "&lt;was&gt; (0.25)"),
        ("after", "said (0.50)"),
    ]
    assert re.findall("<dd>(.*?)</dd>", second)[1:] == ["b's (1.00)".replace("'", "&#x27;"), " (0.00)"]
    assert 'figure class="wrong"' in second


def test_the_box_of_before_is_orange(image):
    ours = [line(image=image, truth=BOX, answer="{<0><0><10><20>}")]
    theirs = [line(image=image, truth=BOX, answer="{<90><80><100><90>}")]
    page = comparison_page({"exact": compared()}, ours, theirs, ("", ""), 3)
    (data,) = re.findall('src="data:image/jpeg;base64,(.*?)"', page)
    with Image.open(io.BytesIO(base64.b64decode(data))) as shown:
        red, green, blue = shown.convert("RGB").getpixel((300, 130))
    assert red > 180 and 90 < green < 190 and blue < 80
