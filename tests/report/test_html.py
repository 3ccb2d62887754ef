from moesaic.report.html import Html, html_table, join_html, tag


def test_text_and_attributes_are_escaped_and_markup_is_not():
    found = tag("p", "<b>&", tag("i", 'a"b'), title='"><script>', class_="x", lang=None)
    assert (
        found.text == '<p title="&quot;&gt;&lt;script&gt;" class="x">&lt;b&gt;&amp;<i>a"b</i></p>'
    )


def test_numbers_are_short_and_none_is_left_out():
    assert tag("a", 1.0, None, 2.50, 3, x=0.125).text == '<a x="0.12">12.53</a>'
    assert tag("br").text == "<br/>"
    assert join_html(["a", Html("<b/>")]).text == "a<b/>"


def test_a_table_names_itself_and_its_rows():
    found = html_table(["a", "b"], rows=[["x", 1]], caption="C & D").text
    assert '<th scope="row">x</th>' in found
    assert "<caption>C &amp; D</caption>" in found
